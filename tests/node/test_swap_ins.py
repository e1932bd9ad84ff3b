"""What is told of swap-ins that come in pieces."""

from __future__ import annotations

import logging

import pytest

from computron.memory.swap import SwapOutcome
from computron.metrics import Metrics
from computron.node.swap_ins import SwapIns


def piece(model: str, *pages: int, seconds: float = 1.0) -> SwapOutcome:
    return SwapOutcome(model, pages, "done", pages, seconds, 10 * len(pages), None, 0.0, seconds)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def swap_ins(metrics: Metrics) -> SwapIns:
    return SwapIns(metrics)


def counted(metrics: Metrics, name: str, model: str = "m") -> float | None:
    return metrics.registry.get_sample_value(f"computron_{name}", {"model": model})


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


def test_pieces_make_one_swap_in(swap_ins: SwapIns, metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    swap_ins.arrived(piece("m", 0, 1, seconds=3.0), 1.0, complete=False)
    swap_ins.arrived(piece("other", 0), 0.0, complete=False)
    assert (counted(metrics, "swap_ins_total"), lines(caplog)) == (None, [])
    swap_ins.arrived(piece("m", 2), 0.0, complete=True)
    assert (counted(metrics, "swap_ins_total"), counted(metrics, "swap_in_seconds_count")) == (1.0, 2.0)
    assert lines(caplog) == ["swap_in model=m pages=3 bytes=30 seconds=4.0000 hidden=0.75 pieces=2"]


def test_what_came_before_the_device_was_emptied_is_no_part_of_the_next_swap_in(
    swap_ins: SwapIns, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    swap_ins.arrived(piece("m", 0), 1.0, complete=False)
    swap_ins.forget()
    swap_ins.arrived(piece("m", 0, 1), 1.0, complete=True)
    assert lines(caplog) == ["swap_in model=m pages=2 bytes=20 seconds=1.0000 hidden=1.00 pieces=1"]
