"""What must not bring the node down, and what must end it cleanly."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import nn

from computron.config import ModelConfig
from computron.errors import ContextTooLong, SwapFailed, Unavailable
from computron.execution.requests import CustomJob, CustomOutput, GenerateJob, SamplingParams, TextOutput
from computron.node.node import Node
from computron.node.snapshot import NodeState
from computron.node.worker import Worker

PAGE = 16 << 10


def job(tokens: int = 4, prompt: int = 3) -> GenerateJob:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerateJob(tuple(5 + i % 50 for i in range(prompt)), params)


async def tokens_of(node: Node, model: str, work: GenerateJob) -> list[int]:
    outputs = [output async for output in node.submit(model, work, request_id="test")]
    return [token for output in outputs if isinstance(output, TextOutput) for token in output.tokens]


async def settled(node: Node) -> None:
    async with asyncio.timeout(10):
        while node.snapshot().requests or any(m.state in ("loading", "running") for m in node.snapshot().models):
            await asyncio.sleep(0.001)
    node.check()


def worker_of(node: Node) -> Worker:
    assert node._crew is not None
    return node._crew.worker


class Slow(nn.Module):
    """Each layer computes for much longer than its transfer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            for _ in range(40):
                y = layer(x)
            x = torch.relu(y)
        return x


async def test_a_step_may_read_its_pages_until_its_end_though_their_swap_fails(starting) -> None:
    slow = ModelConfig(id="slow", task="custom", factory=f"{__name__}:Slow")
    async with starting(slow, pages=200, link_bandwidth=1e9) as node:
        payload = node.models["slow"].loaded.batch_manager.parse({"input": [[0.1] * 256] * 64})

        async def ask() -> object:
            outputs = [o async for o in node.submit("slow", CustomJob(payload), request_id="test")]
            assert isinstance(outputs[0], CustomOutput)
            return outputs[0].value

        expected = await ask()
        for chunk in (40, 80, 120):
            node.unload("slow")
            await settled(node)
            worker_of(node).backend.inject_fault("copy", chunk, "the link fell silent")
            assert await ask() == expected
            await settled(node)


async def test_a_cache_that_cannot_be_mapped_once_costs_a_retry(starting, llama) -> None:
    async with starting(llama("a"), pages=75) as node:
        node.load("a")
        await settled(node)
        worker_of(node).backend.inject_fault("map", 0, "no more mappings")
        assert len(await tokens_of(node, "a", job())) == 4
        await settled(node)
        assert node.ready


async def test_a_cache_that_can_never_be_mapped_is_an_error_of_the_request(starting, llama, monkeypatch) -> None:
    async with starting(llama("a"), pages=75) as node:
        node.load("a")
        await settled(node)
        swapper = worker_of(node).swapper
        set_cache = swapper.set_cache

        def refuse(model: str, frames: int) -> None:
            if frames:
                raise SwapFailed("no more mappings")
            set_cache(model, frames)

        monkeypatch.setattr(swapper, "set_cache", refuse)
        with pytest.raises(SwapFailed, match="no more mappings"):
            await tokens_of(node, "a", job())
        monkeypatch.undo()
        assert len(await tokens_of(node, "a", job())) == 4
        await settled(node)


async def test_full_batches_of_full_contexts_fit_the_cache_range(starting, llama) -> None:
    async with starting(llama("a", max_model_len=98, max_batch_size=32, max_batch_tokens=4096), pages=3000) as node:
        answers = await asyncio.gather(*(tokens_of(node, "a", job(1, prompt=97)) for _ in range(32)))
        assert all(len(answer) == 1 for answer in answers)
        await settled(node)


async def test_what_can_never_fit_the_device_is_refused_at_once(starting, llama) -> None:
    async with starting(llama("a"), pages=31) as node:
        with pytest.raises(ContextTooLong):
            node.submit("a", job(1, prompt=120), request_id="test")
        cut_off = [o async for o in node.submit("a", job(1000), request_id="test")][-1]
        assert isinstance(cut_off, TextOutput)
        assert cut_off.finish_reason == "length"
        await settled(node)


async def test_shutdown_does_not_wait_for_pages_that_are_being_verified(starting, llama) -> None:
    async with starting(llama("a"), pages=75, verify=True, link_bandwidth=2e5) as node:
        handle = node.submit("a", job(), request_id="test")
        async with asyncio.timeout(10):
            while node.snapshot().models[0].state != "running":
                await asyncio.sleep(0.001)
            await node.shutdown(0.0)
        with pytest.raises(Unavailable):
            await anext(handle)


async def test_a_failed_node_runs_no_more_steps(starting, llama, monkeypatch) -> None:
    async with starting(llama("a"), llama("b", seed=1), pages=75) as node:
        long = node.submit("a", job(100), request_id="long")
        await anext(long)
        worker_of(node).backend.inject_fault("device", 0, "an illegal address was accessed")
        with pytest.raises((Unavailable, SwapFailed)):
            await tokens_of(node, "b", job())
        async with asyncio.timeout(5):
            while node.state is not NodeState.FAILED:
                await asyncio.sleep(0.001)
        with pytest.raises(Unavailable, match="illegal address"):
            async for _ in long:
                pass
        await node._steps.wait()
        started: list[object] = []
        monkeypatch.setattr(worker_of(node), "begin_step", started.append)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not started


async def test_log_lines_of_steps_name_no_innocent_request(starting, llama) -> None:
    from contextvars import ContextVar

    current: ContextVar[str] = ContextVar("current", default="-")
    seen: list[str] = []
    async with starting(llama("a")) as node:
        requests = node._requests
        deliver = requests.deliver
        requests.deliver = lambda *args: (seen.append(current.get()), deliver(*args))[1]  # type: ignore[method-assign]
        current.set("mine")
        await tokens_of(node, "a", job())
    assert set(seen) == {"-"}
