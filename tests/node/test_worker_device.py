"""What a worker asks of a GPU, played by stand-ins."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from computron.config import Config, GroupConfig
from computron.errors import ExecutionFailed, SwapFailed
from computron.group.environment import Place
from computron.memory.gate import OPEN
from computron.node import device
from computron.node import worker as node_worker
from computron.node.compute import ComputeThread
from computron.node.measured_gate import MeasuredGate
from computron.node.worker import Worker


class Stream:
    """Of a device that has failed, or has not."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1
        if self._error is not None:
            raise self._error


@pytest.fixture
def worker(monkeypatch) -> Worker:
    """With GPU 3 and nothing else."""
    return make_worker(monkeypatch)


def make_worker(monkeypatch, place: Place | None = None, group: GroupConfig | None = None) -> Worker:
    backend = SimpleNamespace(kind="cuda", device_index=3, free_memory=1000)
    monkeypatch.setattr(node_worker, "open_backend", lambda *_: backend)
    monkeypatch.setattr(node_worker, "page_size", lambda *_: 100)
    monkeypatch.setattr(node_worker, "open_store", lambda *_: None)
    monkeypatch.setattr(device, "Swapper", lambda *_, **settings: SimpleNamespace(**settings))
    return Worker(Config(group=group or GroupConfig(tensor_parallel=1 if place is None else 2)), place)


def step(
    monkeypatch, error: Exception | None, function: Any, communicator: Any = None, chained: bool = False
) -> tuple[Any, Stream]:
    """What comes of a step on GPU 3, of which `error` is told."""
    stream = Stream(error)
    monkeypatch.setattr(torch.cuda, "current_stream", {3: stream}.__getitem__)
    backend: Any = SimpleNamespace(kind="cuda", device_index=3)
    loaded: Any = SimpleNamespace(gate=None)
    thread = ComputeThread(backend, communicator, chained=chained)
    try:
        return thread.step(loaded, MeasuredGate(OPEN), function), stream
    except (ExecutionFailed, SwapFailed) as raised:
        return raised, stream
    finally:
        thread.close()


def test_the_error_of_a_step_is_not_replaced_by_that_of_waiting_for_it(monkeypatch):
    first = SwapFailed("the first")

    def fail() -> None:
        raise first

    for error in (RuntimeError("CUDA error"), None):
        raised, stream = step(monkeypatch, error, fail)
        assert raised is first
        assert stream.waits == 1


def test_a_device_that_fails_after_a_step_fails_the_step_only(monkeypatch):
    raised, _ = step(monkeypatch, RuntimeError("CUDA error: an illegal memory access"), lambda: 7)
    assert isinstance(raised, ExecutionFailed)
    assert "an illegal memory access" in raised.message
    assert step(monkeypatch, None, lambda: 7)[0] == 7


def test_a_group_that_cannot_settle_for_an_error_of_the_device_fails_the_step(monkeypatch):
    def settle() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    raised, stream = step(monkeypatch, None, lambda: 7, SimpleNamespace(settle=settle))
    assert isinstance(raised, ExecutionFailed)
    assert stream.waits == 1


@pytest.fixture
def current(monkeypatch) -> threading.local:
    """`device`: the one that was made this thread's."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(current, "device", index))
    return current


async def test_the_compute_thread_uses_the_nodes_own_gpu(worker, current):
    assert await worker.compute(lambda: current.device) == 3


def test_models_are_loaded_on_the_nodes_own_gpu(worker, current):
    class Looked(Exception): ...

    def add(*_: Any) -> None:
        assert current.device == 3
        raise Looked

    worker.store = SimpleNamespace(add=add)
    plan: Any = SimpleNamespace(config=SimpleNamespace(id="a"), image=None)
    with pytest.raises(Looked):
        worker.load(plan, None)


@pytest.mark.parametrize(("place", "expected"), [(None, 900), (Place(1, 2, 1, 2, "127.0.0.1", 1), 850)])
def test_a_group_leaves_more_of_a_gpu_free(monkeypatch, place, expected):
    swapper: Any = make_worker(monkeypatch, place).swapper
    assert swapper.device_memory == expected


@pytest.mark.parametrize("chained", [False, True])
def test_a_stage_whose_step_failed_has_nothing_to_do_with_the_others_any_more(monkeypatch, chained):
    """They have sent it what the step lacked to read, which the next one would take for its own."""
    said: list[str] = []
    communicator = SimpleNamespace(leave=said.append, settle=lambda: None)
    assert step(monkeypatch, None, lambda: 7, communicator, chained)[0] == 7
    assert said == []

    def fail() -> None:
        raise ExecutionFailed("the model failed")

    step(monkeypatch, None, fail, communicator, chained)
    assert said == (["a step failed: the model failed"] if chained else [])
