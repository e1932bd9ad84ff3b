"""What the comparison of simulated and live latencies computes by itself."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from aiohttp import web

from computron.profiling.questions import texts
from computron.profiling.server import Server
from computron.simulation.workload import Arrival, Workload

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_simulation_fidelity")


def test_workloads_follow_each_other_and_keep_their_requests(fidelity: ModuleType) -> None:
    parts = [case.workload(duration=30.0, seed=3) for case in fidelity.CASES[:3]]
    whole, places = fidelity.one_after_another(parts, 30.0)
    times = [arrival.time for arrival in whole.arrivals]
    assert times == sorted(times)
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        start = number * (30.0 + fidelity.PAUSE)
        assert [each.time - start for each in whole.arrivals[place]] == pytest.approx([a.time for a in part.arrivals])
        assert [each.model for each in whole.arrivals[place]] == [each.model for each in part.arrivals]


def test_error_is_relative_to_the_live_figure(fidelity: ModuleType) -> None:
    rows: dict[str, tuple[float, ...]] = {}

    class Rows:
        def row(self, name: str, value: float, unit: str, *more: float) -> None:
            rows[name] = (value, *more)

    fidelity.add_percentiles(Rows(), "fidelity.x", np.array([0.1, 0.2, 0.3]), np.array([0.1, 0.15, 0.4]))
    assert rows["fidelity.x.p50"] == pytest.approx((150.0, 200.0, 0.75))
    assert rows["fidelity.x.p50_error"] == pytest.approx((0.25,))
    assert rows["fidelity.x.p99_error"] == pytest.approx((0.395 / 0.298 - 1.0,))


async def test_requests_are_sent_when_due_whatever_is_answered(fidelity: ModuleType) -> None:
    arrivals = tuple(Arrival(0.01 * number, "a", prompt_tokens=4 + number) for number in range(5))
    open_at_once: list[int] = []
    waiting = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        open_at_once.append(waiting)
        while len(open_at_once) < len(arrivals):  # nobody is answered before all have been sent
            await asyncio.sleep(0.001)
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/v1/embeddings", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        async with Server(f"{host}:{port}") as server:
            asked = {each: texts("a", "embed", count=1, tokens=each.prompt_tokens) for each in arrivals}
            replayed = await fidelity.replay(server, Workload("w", ("a",), arrivals), asked)
    finally:
        await runner.cleanup()
    assert open_at_once == [1, 2, 3, 4, 5]
    assert [each.prompt_tokens for each in replayed.sent.arrivals] == [4, 5, 6, 7, 8]
    assert all(sent.time >= due.time for sent, due in zip(replayed.sent.arrivals, arrivals, strict=True))
