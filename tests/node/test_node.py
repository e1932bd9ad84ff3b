from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn

from computron.config import ModelConfig
from computron.errors import (
    BadRequest,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    ExecutionFailed,
    ModelNotFound,
    SwapFailed,
    Unavailable,
)
from computron.execution.requests import CustomJob, CustomOutput, GenerateJob, SamplingParams, TextOutput
from computron.node.node import Node
from computron.node.snapshot import NodeState


def job(tokens: int = 4, prompt: tuple[int, ...] = (5, 6, 7)) -> GenerateJob:
    return GenerateJob(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))


async def tokens_of(node: Node, model: str, work: GenerateJob) -> list[int]:
    outputs = [output async for output in node.submit(model, work, request_id="test")]
    return [token for output in outputs if isinstance(output, TextOutput) for token in output.tokens]


def state_of(node: Node, model: str) -> str:
    return next(m.state for m in node.snapshot().models if m.model == model)


async def settled(node: Node) -> None:
    async with asyncio.timeout(10):
        while node.snapshot().requests or any(m.state in ("loading", "running") for m in node.snapshot().models):
            await asyncio.sleep(0.001)
    node.check()


async def test_models_that_do_not_fit_together_take_turns(starting, llama) -> None:
    async with starting(llama("a", seed=1), llama("b", seed=2), llama("c", seed=3), pages=40) as node:
        first = {model: await tokens_of(node, model, job()) for model in "abc"}
        assert len({tuple(tokens) for tokens in first.values()}) == 3
        for _ in range(5):
            assert {model: await tokens_of(node, model, job()) for model in "abc"} == first
        both = await asyncio.gather(*(tokens_of(node, model, job()) for model in "abcabc"))
        assert both == [first[model] for model in "abcabc"]
        await settled(node)


async def test_timings_tell_what_a_request_waited_for(starting, llama) -> None:
    async with starting(llama("a")) as node:
        handle = node.submit("a", job(), request_id="test")
        async for _ in handle:
            pass
        cold = handle.timings
        assert cold.swap_bytes == node.models["a"].held.nbytes
        assert cold.queue_seconds is not None
        assert cold.first_output_seconds is not None
        assert cold.total_seconds is not None
        assert cold.queue_seconds <= cold.first_output_seconds <= cold.total_seconds
        warm = node.submit("a", job(), request_id="test")
        async for _ in warm:
            pass
        assert warm.timings.swap_bytes == 0


async def test_a_cancelled_request_frees_its_place_in_the_middle_of_a_run(starting, llama) -> None:
    async with starting(llama("a", max_batch_size=1)) as node:
        endless = node.submit("a", job(tokens=100), request_id="endless")
        await anext(endless)
        waiting = asyncio.create_task(tokens_of(node, "a", job()))
        await asyncio.sleep(0)
        await endless.aclose()
        assert len(await waiting) == 4
        await settled(node)
        assert node.snapshot().nodes[0].device_memory["cache"] == 0


async def test_a_waiting_request_that_is_cancelled_is_never_run(starting, llama) -> None:
    async with starting(llama("a"), llama("b", seed=1), pages=40, link_bandwidth=4e6) as node:
        running = asyncio.create_task(tokens_of(node, "a", job()))
        await asyncio.sleep(0)
        waiting = node.submit("b", job(), request_id="waiting")
        await waiting.aclose()
        assert len(await running) == 4
        await settled(node)
        assert waiting.timings.queue_seconds is None


async def test_a_link_fault_in_a_swap_is_retried_and_the_answer_is_right(starting, llama) -> None:
    async with starting(llama("a")) as node:
        expected = await tokens_of(node, "a", job())
        node.unload("a")
        await settled(node)
        assert state_of(node, "a") == "absent"
        worker = node._crew.worker
        assert worker is not None
        worker.backend.inject_fault("copy", 3, "the link fell silent")
        assert await tokens_of(node, "a", job()) == expected
        await settled(node)


async def test_a_link_that_stays_broken_gives_a_clear_error_and_the_model_works_after_it(starting, llama) -> None:
    async with starting(llama("a"), link_bandwidth=4e6) as node:
        worker = node._crew.worker
        assert worker is not None
        stop = asyncio.Event()

        async def keep_breaking() -> None:
            while not stop.is_set():
                worker.backend.inject_fault("copy", 0, "the link fell silent")
                await asyncio.sleep(0)

        breaking = asyncio.create_task(keep_breaking())
        with pytest.raises(SwapFailed, match=r"'a' could not be brought to the device: .*the link fell silent"):
            await tokens_of(node, "a", job())
        stop.set()
        await breaking
        for _ in range(3):  # a fault that is still armed may strike once more
            try:
                assert len(await tokens_of(node, "a", job())) == 4
                break
            except SwapFailed:
                continue
        assert len(await tokens_of(node, "a", job())) == 4
        await settled(node)


async def test_a_sticky_device_error_ends_every_request_and_readiness(starting, llama) -> None:
    async with starting(llama("a")) as node:
        worker = node._crew.worker
        assert worker is not None
        worker.backend.inject_fault("device", 0, "an illegal address was accessed")
        with pytest.raises((Unavailable, SwapFailed)):
            await tokens_of(node, "a", job())
        async with asyncio.timeout(5):
            while node.state is not NodeState.FAILED:
                await asyncio.sleep(0.001)
        assert not node.ready
        with pytest.raises(Unavailable, match="illegal address"):
            node.submit("a", job(), request_id="later")


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x < 0).any()):
            raise ValueError("negative numbers hurt")
        return x * self.weight


async def test_a_model_that_raises_fails_its_requests_alone(starting) -> None:
    moody = ModelConfig(id="moody", task="custom", factory=f"{__name__}:Moody", max_batch_size=1)
    async with starting(moody) as node:

        async def ask(value: float) -> Any:
            payload = node.models["moody"].loaded.batch_manager.parse({"input": [value] * 4})
            outputs = [o async for o in node.submit("moody", CustomJob(payload), request_id="test")]
            assert isinstance(outputs[0], CustomOutput)
            return outputs[0].value

        with pytest.raises(ExecutionFailed, match="negative numbers hurt"):
            await ask(-1.0)
        assert await ask(2.0) == [2.0] * 4
        await settled(node)


async def test_a_deadline_that_passes_while_waiting_rejects(starting, llama) -> None:
    async with starting(llama("a"), llama("b", seed=1), pages=40, link_bandwidth=2e6) as node:
        first = asyncio.create_task(tokens_of(node, "a", job()))
        await asyncio.sleep(0)
        handle = node.submit("b", job(), request_id="late", deadline=0.02)
        with pytest.raises(DeadlineExceeded):
            await anext(handle)
        assert len(await first) == 4


async def test_bad_jobs_are_refused_before_they_are_queued(starting, llama) -> None:
    async with starting(llama("a")) as node:
        with pytest.raises(ModelNotFound, match="nobody"):
            node.submit("nobody", job(), request_id="test")
        with pytest.raises(BadRequest):
            node.submit("a", job(prompt=()), request_id="test")
        with pytest.raises(BadRequest):
            node.submit("a", job(prompt=tuple(range(200))), request_id="test")
        assert node.snapshot().requests == 0


async def test_a_model_larger_than_the_device_is_refused_with_both_numbers(starting, llama) -> None:
    with pytest.raises(ConfigError, match=r"model 'a' needs .* MiB .* but device.memory is .* MiB"):
        async with starting(llama("a"), pages=4):
            pass


async def test_a_missing_checkpoint_names_itself(starting, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        async with starting(ModelConfig(id="a", source=str(tmp_path / "nowhere"))):
            pass


async def test_shutdown_drains_and_then_ends_what_is_left_with_an_error(starting, llama) -> None:
    async with starting(llama("a")) as node:
        short = asyncio.create_task(tokens_of(node, "a", job(tokens=2)))
        await asyncio.sleep(0)
        await node.shutdown(drain=10.0)
        assert len(await short) == 2
        with pytest.raises(Unavailable):
            node.submit("a", job(), request_id="late")
    async with starting(llama("a"), llama("b"), link_bandwidth=1e6) as node:
        handle = node.submit("a", job(tokens=100), request_id="long")
        shutting = asyncio.create_task(node.shutdown(drain=0.0))
        with pytest.raises(Unavailable, match="shutting down"):
            async for _ in handle:
                pass
        await shutting


async def test_pinned_models_stay(starting, llama) -> None:
    async with starting(llama("a", pinned=True), llama("b", seed=1), llama("c", seed=2), pages=75) as node:
        await settled(node)
        assert state_of(node, "a") == "resident"
        for model in "bcbc":
            await tokens_of(node, model, job())
            assert state_of(node, "a") == "resident"
        await settled(node)


async def test_load_and_unload_are_obeyed(starting, llama) -> None:
    async with starting(llama("a"), pages=75) as node:
        node.load("a")
        await settled(node)
        assert state_of(node, "a") == "resident"
        node.unload("a")
        await settled(node)
        assert state_of(node, "a") == "absent"
        assert node.snapshot().nodes[0].device_memory["parameters"] == 0
