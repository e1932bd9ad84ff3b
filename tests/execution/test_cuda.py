"""The same on a GPU, and no step waits for the GPU before its tokens are needed."""

from __future__ import annotations

import pytest
import torch

from computron.execution.generate_runner import GenerateRunner
from computron.execution.steps import TokenBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FAMILIES = ["llama", "opt", "gpt2", "qwen2", "gemma2", "mistral"]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_in_chunks_and_together(name, rig, greedy, prompts, reference) -> None:
    one = rig(name, device="cuda", max_batch_tokens=50)
    answers = one.run([greedy(prompt) for prompt in prompts])
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype, rig, greedy, prompts) -> None:
    answers = rig("llama", device="cuda", dtype=dtype).run([greedy(prompt) for prompt in prompts])
    assert all(len(answer.tokens) == 8 for answer in answers)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_forward_never_waits_for_the_gpu(name, rig, greedy, prompts, monkeypatch) -> None:
    one = rig(name, device="cuda")
    forward = GenerateRunner._forward

    def watched(runner: GenerateRunner, part: TokenBatch) -> torch.Tensor | None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(runner, part)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    one.run([greedy(prompts[-1])])
    monkeypatch.setattr(GenerateRunner, "_forward", watched)
    assert all(len(answer.tokens) == 8 for answer in one.run([greedy(prompt) for prompt in prompts]))
