"""What bench_rivals computes beside running servers: the requests, what is right, what is read from the systems."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "rivals"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def server_of(rival: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the program finds its neighbours by itself
    spec = importlib.util.spec_from_file_location(f"{rival}_server", FOLDER / "rivals" / rival / "server.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def question(answer: str = "Paris") -> Any:
    return module("_questions").Completion("The capital of France is", 4, answer)


def ask(time: float, model: str = "a") -> Any:
    return module("_open_loop").Ask(time, model, question())


def test_arrivals_are_in_order_and_the_same_for_a_seed() -> None:
    asks = module("_open_loop").asks
    questions = {"a": [question("1"), question("2")], "b": [question("3")]}
    asked = asks({"a": 5.0, "b": 1.0}, 4.0, 50.0, 7, questions)
    assert asked == asks({"a": 5.0, "b": 1.0}, 4.0, 50.0, 7, questions)
    assert asked != asks({"a": 5.0, "b": 1.0}, 4.0, 50.0, 8, questions)
    times = [one.time for one in asked]
    assert times == sorted(times)
    assert [one.question.answer for one in asked if one.model == "a"][:4] == ["1", "2", "1", "2"]


def test_idle_timeout_keeps_at_most_the_room_loaded_on_average() -> None:
    idle_timeout = module("_open_loop").idle_timeout
    both_at_once = [ask(0.0, "a"), ask(0.0, "b")]
    assert idle_timeout(both_at_once, 1, 10.0) == 5  # two models for 5 of 10 seconds
    assert idle_timeout(both_at_once, 2, 10.0) == 10
    assert idle_timeout([ask(float(t), m) for t in range(10) for m in "ab"], 1, 10.0) == 1  # never less


async def answered_with(handler: Any, asked: list[Any], limit: float) -> tuple[list[Any], float]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        outcomes, seconds = await module("_open_loop").replay(url, asked, name_of=str.upper, limit=limit)
        return outcomes, seconds


def reply(text: str) -> web.Response:
    return web.json_response({"choices": [{"text": text}]})


async def test_requests_do_not_wait_for_answers_to_earlier_ones() -> None:
    came: list[str] = []
    all_there = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        came.append((await request.json())["model"])
        if len(came) == 3:
            all_there.set()
        await all_there.wait()
        return reply("Paris")

    outcomes, _ = await answered_with(handler, [ask(0.0), ask(0.01), ask(0.02)], limit=30.0)
    assert [outcome.right for outcome in outcomes] == [True] * 3
    assert came == ["A"] * 3


async def test_wrong_failed_and_late_answers_are_told_apart() -> None:
    turns = iter((lambda: reply("London"), lambda: web.Response(status=503), None))

    async def handler(request: web.Request) -> web.Response:
        turn = next(turns)
        if turn is None:
            await asyncio.sleep(60)
        return turn()

    outcomes, seconds = await answered_with(handler, [ask(0.0), ask(0.05), ask(0.1)], limit=0.5)
    assert sorted(map(str, (outcome.right for outcome in outcomes))) == ["False", "None", "None"]
    assert all(outcome.latency >= 0.5 for outcome in outcomes if outcome.right is None)
    summary = module("_open_loop").summarize(outcomes, seconds)
    assert (summary.answered, summary.wrong) == (1, 1)
    assert summary.tokens == pytest.approx(4 / seconds)


def test_embedding_is_right_if_it_points_where_it_should() -> None:
    wanted = module("_questions").Embedding("text", (0.6, 0.8))
    assert wanted.is_answered_by({"data": [{"embedding": [0.6001, 0.7999]}]})
    assert not wanted.is_answered_by({"data": [{"embedding": [0.8, 0.6]}]})


def test_margin_is_that_of_the_least_sure_step() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [2.0, 0.0, 1.5]])
    assert module("_questions").margin(logits) == 0.5


def test_noise_changes_every_page_a_little() -> None:
    noisy = module("_fine_tunes").noisy
    tensor = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    changed = noisy(tensor, 1)
    assert torch.equal(changed, noisy(tensor, 1))
    assert not torch.equal(changed, noisy(tensor, 2))
    assert (changed != tensor).any(dim=1).all()
    assert (changed.float() - tensor.float()).std() < 0.03
    whole = torch.arange(4)
    assert torch.equal(noisy(whole, 1), whole)


def test_warm_up_ends_with_the_models_asked_most() -> None:
    asked = [ask(float(t), model) for t, model in enumerate("abbcccdddd")]
    order = module("bench_rivals").warm_up_order(asked, 2)
    assert [(one.model, one.time) for one in order] == [("c", 3.0), ("d", 6.0)]


def test_rivals_are_chosen_among_those_that_serve_the_workload() -> None:
    bench = module("bench_rivals")
    embed = bench.WORKLOADS["embed"]
    assert bench.chosen_rivals(embed, "vllm_cpu,torch_to", quick=False) == ["torch_to"]
    assert bench.chosen_rivals(embed, None, quick=True) == ["ray_serve"]
    with pytest.raises(SystemExit, match="llama: not one of ray_serve"):
        bench.chosen_rivals(embed, "llama", quick=False)


def test_loads_of_computron_are_read_from_its_metrics() -> None:
    text = (
        'computron_swap_ins_total{model="a"} 1.0\n'
        'computron_swap_ins_total{model="b"} 2.0\n'
        'computron_swaps_total{node="0",outcome="done"} 9.0\n'
        'computron_transfer_bytes_total{node="0"} 2.5e+09\n'
    )
    systems = module("_rival_systems")
    assert systems.computron_loads(text) - systems.Loads(1, 5e8) == systems.Loads(2.0, 2e9)


def test_rival_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install = module("install")
    monkeypatch.setattr(install, "ENVIRONMENTS", tmp_path)
    assert "run benchmarks/rivals/install.py" in install.reason_of("ray_serve")
    (tmp_path / "ray_serve.reason").write_text("ERROR: no such wheel\n")
    assert install.reason_of("ray_serve") == "does not install here: ERROR: no such wheel"


def test_every_rival_has_requirements() -> None:
    assert set(module("install").rivals()) == set(module("bench_rivals").RIVALS)


def test_module_computes_the_same_on_the_device_and_gives_its_memory_back() -> None:
    moving = module("moving")
    linear = torch.nn.Linear(3, 2)

    class Held(moving.Model):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self._parameters = list(linear.parameters())
            self._host = [parameter.data for parameter in self._parameters]

        def answers(self, bodies: Any) -> list[dict[str, Any]]:
            return []

    held, given, places = Held(), torch.ones(1, 3), [p.data_ptr() for p in linear.parameters()]
    expected = linear(given)
    held.to_device()
    assert held.nbytes == 8 * 4
    assert all(p.data_ptr() != place for p, place in zip(linear.parameters(), places, strict=True))
    assert torch.equal(linear(given), expected)
    held.to_host()
    assert [p.data_ptr() for p in linear.parameters()] == places


def test_padding_does_not_count_in_the_mean() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [100.0, 0.0]]])
    mean = module("moving").mean_of_tokens(hidden, torch.tensor([[1, 0]]))
    assert torch.allclose(mean, torch.tensor([[0.6, 0.8]]))


def test_plain_server_batches_what_waits_for_the_oldest_requests_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = server_of("torch_to", monkeypatch)
    server = object.__new__(plain.Server)
    server._settings = SimpleNamespace(max_batch_size=2)
    server._waiting = [plain.Waiting(model, {"n": n}, None) for n, model in enumerate("abaab")]
    assert [waiting.body["n"] for waiting in server._take_batch()] == [0, 2]
    assert [waiting.body["n"] for waiting in server._take_batch()] == [1, 4]
    assert [waiting.body["n"] for waiting in server._take_batch()] == [3]


async def test_switcher_stops_the_process_used_least_recently_of_those_without_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switching = server_of("switcher", monkeypatch)
    stopped: list[str] = []
    switcher = switching.Switcher({"room": 2}, SimpleNamespace())

    async def start(model: str) -> Any:
        return switching.Process(port=0, running=SimpleNamespace(model=model, returncode=None))

    async def stop(process: Any) -> None:
        stopped.append(process.running.model)

    monkeypatch.setattr(switcher, "_start", start)
    monkeypatch.setattr(switching, "_stop", stop)
    old, recent = await switcher._acquire("old"), await switcher._acquire("recent")
    old.in_flight = recent.in_flight = 0
    old.used, recent.used = 1.0, 2.0
    await switcher._acquire("third")
    assert stopped == ["old"]
    recent.in_flight = 1
    waiting = asyncio.create_task(switcher._acquire("fourth"))
    await asyncio.sleep(0)
    assert stopped == ["old"]
    recent.in_flight = 0
    async with switcher._changed:
        switcher._changed.notify_all()
    fourth = await waiting
    assert stopped == ["old", "recent"]
    fourth.running.returncode = 1
    assert await switcher._acquire("fourth") is not fourth
