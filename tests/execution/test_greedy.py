"""Greedy tokens are transformers.generate's, however the work is cut up."""

from __future__ import annotations

import random

import pytest
import torch

FAMILIES = ["llama", "opt", "gpt2", "qwen2", "gemma2", "mistral", "deepseek", "gpt_oss"]
FRAME_BYTES = 1 << 16


@pytest.mark.parametrize("name", FAMILIES)
def test_each_prompt_alone(name, rig, greedy, prompts, reference) -> None:
    one = rig(name)
    for prompt in prompts:
        assert one.run([greedy(prompt)])[0].tokens == reference(name, prompt)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_prompts_together(name, rig, greedy, prompts, reference) -> None:
    answers = rig(name, max_batch_size=20).run([greedy(prompt) for prompt in prompts])
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("budget", [5, 37])
def test_prompts_in_chunks(name, budget, rig, greedy, prompts, reference) -> None:
    one = rig(name, max_batch_tokens=budget, max_batch_size=4)
    result = one.step([one.add(greedy(prompts[-1]))])
    assert result.tokens == budget
    assert result.outputs == []
    answers = one.run([greedy(prompt) for prompt in prompts])
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_sequences_of_very_different_length(name, rig, greedy, prompts, reference, monkeypatch) -> None:
    monkeypatch.setattr("computron.execution.attention_plan.MAX_PADDING_BLOCKS", 1)
    answers = rig(name).run([greedy(prompt) for prompt in prompts])
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_preempted_sequences(name, rig, greedy, prompts, reference) -> None:
    one = rig(name, max_batch_tokens=40)
    generator = random.Random(1)

    def preempt_some(step: int, running: list[int]) -> None:
        for request in running:
            if generator.random() < 0.15:
                assert one.executor.preempt(request) >= 1

    answers = one.run([greedy(prompt) for prompt in prompts], preempt_some)
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]


def test_sequences_whose_blocks_move(rig, greedy, prompts, reference) -> None:
    one = rig("llama")
    frames = len(one.cache) // FRAME_BYTES

    def shrink_and_grow(step: int, running: list[int]) -> None:
        if step % 3 == 2:
            blocks = len(one.executor._allocator.used)
            fewest = next(n for n in range(frames) if int(n * one.executor.blocks_per_frame) >= blocks)
            one.set_cache(fewest)
            one.cache[fewest * FRAME_BYTES :] = 0xFF
            one.set_cache(frames)

    answers = one.run([greedy(prompt, 8 + index) for index, prompt in enumerate(prompts)], shrink_and_grow)
    assert [a.tokens for a in answers] == [reference("llama", p, 8 + i) for i, p in enumerate(prompts)]


def test_sequences_that_wait_keep_their_cache(rig, greedy, prompts, reference) -> None:
    one = rig("llama")
    first, second = one.add(greedy(prompts[-1])), one.add(greedy(prompts[-2]))
    tokens: dict[int, list[int]] = {first: [], second: []}
    for step in range(15):
        for output in one.step([first] if step % 2 else [second]).outputs:
            tokens[output.request] += output.tokens
    assert tokens == {first: reference("llama", prompts[-1])[:7], second: reference("llama", prompts[-2])}


def test_half_precision_gives_the_tokens_of_a_forward_without_a_cache(rig, greedy, prompts) -> None:
    """In half precision the order of sums matters: the chosen token must be the likeliest but for rounding."""
    one = rig("llama", dtype="bfloat16")
    model = rig("llama", dtype="float32").model.module
    model.set_attn_implementation("sdpa")
    for prompt, answer in zip(prompts, one.run([greedy(prompt) for prompt in prompts]), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits[range(len(answer.tokens)), answer.tokens]
        assert (logits.max(-1).values - chosen).max() < 0.1 * logits.std()


@pytest.mark.models
def test_smollm2_alone_and_together(smollm2, greedy) -> None:
    one, prompts, expected = smollm2
    assert [one.run([greedy(prompt)])[0].tokens for prompt in prompts] == expected
    assert [answer.tokens for answer in one.run([greedy(prompt) for prompt in prompts])] == expected
