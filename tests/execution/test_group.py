"""A leader that plans and nodes that run: what travels between them changes nothing."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, BertConfig, ViTConfig

from computron.errors import GroupBroken, SwapFailed
from computron.execution.requests import ClassifyJob, EmbedJob, GenerateJob, SamplingParams
from computron.execution.steps import GenerateStep, LogitsOutput, TokensOutput
from computron.models import OpenGate

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek"])
def test_greedy_tokens(name, group, greedy, prompts, reference) -> None:
    nodes = group(name, max_batch_tokens=37, max_batch_size=20)
    answers = nodes.run([greedy(prompt) for prompt in prompts])
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]
    assert all(isinstance(output, TokensOutput) for output in nodes.outputs)


def test_preempted_sequences_and_blocks_that_move(group, greedy, prompts, reference) -> None:
    nodes = group(max_batch_tokens=40)
    frames = len(nodes.caches[0]) // (1 << 16)
    generator = random.Random(1)
    moved = []

    def disturb(step: int, running: list[int]) -> None:
        for request in running:
            if generator.random() < 0.1:
                nodes.executor.preempt(request)
        if step % 3 == 2:
            blocks = len(nodes.executor._allocator.used)
            fewest = next(n for n in range(frames) if int(n * nodes.executor.blocks_per_frame) >= blocks)
            moves = nodes.executor.set_cache(fewest)
            moved.append(moves)
            for runner, cache in zip(nodes.runners, nodes.caches, strict=True):
                runner.move_cache(moves)
                cache[fewest * (1 << 16) :] = 0xFF
            nodes.set_cache(frames)

    answers = nodes.run([greedy(prompt) for prompt in prompts], disturb)
    assert [answer.tokens for answer in answers] == [reference("llama", prompt) for prompt in prompts]
    assert any(moved)
    assert torch.equal(nodes.caches[0], nodes.caches[1])


def test_samples_and_log_probabilities(group, rig, greedy, prompts) -> None:
    jobs = [
        GenerateJob(tuple(prompts[9]), SamplingParams(9, temperature=1.0, seed=1, logprobs=2, top_p=0.9)),
        GenerateJob(tuple(prompts[12]), SamplingParams(9, temperature=0.0, prompt_logprobs=1)),
        GenerateJob(tuple(prompts[3]), SamplingParams(9, temperature=0.7, seed=3, repetition_penalty=1.3)),
        greedy(prompts[5], 12),
    ]
    nodes = group()
    for one, other in zip(nodes.run(jobs), rig("llama").run(jobs), strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
        assert [each.logprob for each in one.logprobs] == pytest.approx([each.logprob for each in other.logprobs])
        assert (one.texts[0].prompt_logprobs is None) == (other.texts[0].prompt_logprobs is None)
    assert isinstance(nodes.outputs[0], LogitsOutput)
    assert isinstance(nodes.outputs[-1], TokensOutput)  # only the greedy request is left


def test_logits_that_are_no_numbers_fail_that_request_alone(group, greedy, reference, prompts) -> None:
    nodes = group()
    with torch.inference_mode():
        nodes.runners[-1]._model.module.model.embed_tokens.weight[299] = torch.nan
    good, bad = nodes.run([greedy(prompts[4]), greedy((299,))])
    assert good.tokens == reference("llama", prompts[4])
    assert "NaN" in bad.outputs[0].message


def test_prompts_whose_logits_travel_are_scored_a_few_tokens_a_step(group, rig, greedy, prompts, monkeypatch) -> None:
    monkeypatch.setattr("computron.execution.sequence.PROMPT_LOGPROBS_CHUNK", 50)
    nodes = group()
    jobs = [greedy(prompt, 2, prompt_logprobs=0) for prompt in prompts[-3:]]
    for one, other in zip(nodes.run(jobs), rig("llama").run(jobs), strict=True):
        assert [each.logprob for each in one.texts[0].prompt_logprobs[1:]] == pytest.approx(
            [each.logprob for each in other.texts[0].prompt_logprobs[1:]], abs=1e-4
        )
    rows = [len(output.logits) for output in nodes.outputs if isinstance(output, LogitsOutput)]
    assert 50 <= max(rows) <= 50 + len(jobs)  # those that decode beside them


def test_every_node_but_one_keeps_its_result(family, load, new_group, greedy) -> None:
    nodes = new_group([load(family("llama")[1]) for _ in range(2)], 2, 1)
    assert len(nodes.run([greedy((1, 2, 3))])[0].tokens) == 8  # step() takes one output and no more
    given = [runner.run(nodes.steps[-1], OpenGate()) for runner in nodes.runners]
    assert [output is None for output in given] == [False, True]
    assert all(len(step.parts) == 1 for step in nodes.steps)


@pytest.mark.parametrize("error", [GroupBroken("node 1 is gone"), SwapFailed("the link is down")])
def test_what_is_nobodys_fault_passes_as_it_is(error, group, greedy, monkeypatch) -> None:
    nodes = group()
    request = nodes.add(greedy((1, 2, 3)))

    def broken(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(nodes.runners[0]._model.module.model.norm, "forward", broken)
        with pytest.raises(type(error)) as raised:
            nodes.step([request])
    assert raised.value is error
    assert not nodes.executor._allocator.used
    assert nodes.step([request]).batch_size == 1


def test_a_block_is_as_large_and_the_cache_as_small_as_on_any_node(group, greedy) -> None:
    """The second node has room for fewer blocks."""
    executor = group().executor
    own = group().runners[0]
    executor.set_cache(0)
    before = executor.blocks_per_frame
    executor.limit_cache(2 * own.block_bytes, 5)
    assert executor.blocks_per_frame == before / 2
    assert executor.max_len == 5 * 16
    assert executor.set_cache(1000) == {}
    request = 1
    executor.add(request, greedy((1,) * 79, 10))
    step = executor.plan([request])
    assert isinstance(step, GenerateStep)
    assert step.cleared.tolist() == [0, 1, 2, 3, 4]


def test_embeddings(random_checkpoint, load, new_group, new_rig, prompts) -> None:
    _, folder = random_checkpoint(AutoModel, BertConfig(**SIZES, vocab_size=300, max_position_embeddings=110))
    settings = {"task": "embed", "max_batch_size": 6, "max_batch_tokens": 150}
    nodes = new_group([load(folder, **settings) for _ in range(2)], 1, 2)
    jobs = [EmbedJob(tuple(token % 290 + 2 for token in prompt)) for prompt in prompts]
    given = [answer.outputs[0].embedding for answer in nodes.run(jobs)]
    assert given == [answer.outputs[0].embedding for answer in new_rig(load(folder, **settings)).run(jobs)]


def test_images(random_checkpoint, load, new_group, new_rig) -> None:
    config = ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5)
    _, folder = random_checkpoint(AutoModelForImageClassification, config)
    settings = {"task": "classify", "max_batch_size": 4}
    nodes = new_group([load(folder, **settings) for _ in range(2)], 1, 2)
    images = torch.randn((6, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    jobs = [ClassifyJob(pixels=image) for image in images]
    given = [answer.outputs[0].probabilities for answer in nodes.run(jobs)]
    assert given == [answer.outputs[0].probabilities for answer in new_rig(load(folder, **settings)).run(jobs)]


def test_a_step_says_all_that_a_node_needs(group, rig, greedy, prompts) -> None:
    """A node that takes part for the first time, as after a restart, gives the same as one that was always there."""
    nodes, late = group(), rig("llama")
    request = nodes.add(greedy(prompts[7]))
    nodes.step([request])
    nodes.executor.preempt(request)
    nodes.step([request])
    assert late.runner.run(nodes.steps[-1], OpenGate()).tokens.tolist() == nodes.outputs[-1].tokens.tolist()
