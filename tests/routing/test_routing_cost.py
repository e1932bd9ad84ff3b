"""What a choice costs, in executed instructions: not more for models that nobody asks for."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from computron.routing import ROUTERS, GroupSize, ModelFacts, Router

GB = 10**9


def instructions(call: Callable[[], Any]) -> int:
    executed = 0

    def trace(frame: Any, what: str, argument: Any) -> Any:
        nonlocal executed
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        executed += what == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return executed


def cost(name: str, idle: int) -> int:
    """Of 200 requests to 8 models on 4 groups, beside so many models that were used once and are on some device."""
    draw = random.Random(0)
    busy = [ModelFacts(f"busy-{number}", 4 * GB) for number in range(8)]
    others = [ModelFacts(f"idle-{number}", 1) for number in range(idle)]
    it = Router(ROUTERS[name](), busy + others, [GroupSize(10 * GB, 2 * GB)] * 4)
    for model in others:
        group = it.route(model.name, 0.0)
        it.reported(group, model.name, model.bytes, 0.0)
        it.ended(group, model.name, 0.0, 0.1)

    def load() -> None:
        for moment in range(200):
            model = draw.choice(busy).name
            group = it.route(model, float(moment))
            it.reported(group, model, 4 * GB * (moment % 3 > 0), float(moment))
            if moment % 5:
                it.ended(group, model, float(moment), 0.5)

    return instructions(load)


@pytest.mark.parametrize("name", ROUTERS)
def test_cost_does_not_grow_with_idle_models(name: str) -> None:
    few, many = cost(name, 10), cost(name, 1_000)
    assert many <= 1.1 * few
