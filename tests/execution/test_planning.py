"""What the leader's part does without any node: what it plans, and that a step that came to nothing leaves nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, BertConfig

from computron.errors import ExecutionFailed
from computron.execution.requests import EmbedJob, GenerateJob, SamplingParams
from computron.execution.steps import LogitsOutput, TokensOutput
from computron.models import OpenGate

PROMPT = (39, 68, 75, 75, 78)


def test_an_abandoned_step_gives_its_blocks_back(rig, greedy, prompts) -> None:
    one = rig("llama", max_batch_tokens=60)
    old, new = one.add(greedy(prompts[9])), one.add(greedy(prompts[-1]))
    one.step([old])
    used = one.executor._allocator.used
    step = one.executor.plan([old, new])
    assert len(one.executor._allocator.used) > len(used)
    one.executor.abandon(step)
    one.executor.abandon(step)
    assert one.executor._allocator.used == used
    again = one.executor.plan([old, new])
    for name in ("tokens", "starts", "lengths", "blocks", "rows"):
        assert getattr(again.parts[0], name).tolist() == getattr(step.parts[0], name).tolist()
    assert again.cleared.tolist() == step.cleared.tolist()


def test_a_finished_step_cannot_be_abandoned(rig, greedy) -> None:
    one = rig("llama")
    request = one.add(greedy(PROMPT))
    step = one.executor.plan([request])
    one.executor.finish(step, one.runner.run(step, OpenGate()))
    used = one.executor._allocator.used
    one.executor.abandon(step)
    assert one.executor._allocator.used == used == {0}


def test_a_request_that_was_dropped_meanwhile_gives_its_blocks_back_once(rig, greedy) -> None:
    one = rig("llama")
    requests = [one.add(greedy(PROMPT)), one.add(greedy(PROMPT))]
    step = one.executor.plan(requests)
    one.executor.drop(requests[0])
    one.executor.abandon(step)
    assert not one.executor._allocator.used
    step = one.executor.plan(requests)
    assert step.parts[0].lengths.tolist() == [5]


def test_a_failure_while_tokens_are_chosen_can_be_abandoned(rig, greedy, monkeypatch) -> None:
    one = rig("llama")
    request = one.add(greedy(PROMPT))

    def broken(*args: object) -> None:
        raise MemoryError("no room for a sort")

    with monkeypatch.context() as patch:
        patch.setattr("computron.execution.generate.choose", broken)
        with pytest.raises(ExecutionFailed, match="no room for a sort"):
            one.step([request])
    assert not one.executor._allocator.used
    assert one.step([request]).tokens == 5


@pytest.mark.parametrize(
    ("params", "greedy_step"),
    [
        ({}, True),
        ({"stop": ("x",), "stop_token_ids": (3,), "ignore_eos": True, "seed": 1}, True),
        ({"temperature": 1.0}, False),
        ({"logprobs": 0}, False),
        ({"prompt_logprobs": 0}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"min_tokens": 2, "stop_token_ids": (3,)}, False),
    ],
)
def test_likeliest_tokens_are_asked_for_where_they_are_enough(params, greedy_step, rig, greedy) -> None:
    one = rig("llama", max_batch_tokens=64)
    job = GenerateJob(PROMPT, SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **params}))
    for others in ([], [one.add(greedy((1, 2, 3)))]):
        step = one.executor.plan([*others, one.add(job)])
        assert step.greedy == greedy_step
        output = one.runner.run(step, OpenGate())
        assert isinstance(output, TokensOutput if greedy_step else LogitsOutput)
        one.executor.finish(step, output)


def test_likeliest_tokens_are_enough_again_when_an_ending_is_allowed(rig) -> None:
    one = rig("llama")
    params = SamplingParams(9, temperature=0.0, min_tokens=2, stop_token_ids=(3,))
    request = one.add(GenerateJob(PROMPT, params))
    greedy = []
    for _ in range(3):
        step = one.executor.plan([request])
        greedy.append(step.greedy)
        one.executor.finish(step, one.runner.run(step, OpenGate()))
    assert greedy == [False, False, True]


def test_a_chunk_that_no_token_follows_wants_no_logits(rig) -> None:
    one = rig("llama", max_batch_tokens=8, max_batch_size=1)
    request = one.add(GenerateJob(PROMPT * 3, SamplingParams(4, temperature=1.0)))
    step = one.executor.plan([request])
    assert (step.greedy, step.parts[0].rows.tolist()) == (True, [])
    output = one.runner.run(step, OpenGate())
    assert output.tokens.tolist() == []
    assert one.executor.finish(step, output).outputs == []


def test_nothing_to_run_is_no_step(rig, greedy) -> None:
    one = rig("llama")
    request = one.add(greedy(PROMPT))
    one.step([request])
    assert one.executor.plan([99]) is None
    assert one.executor.empty_result().cache_blocks == {request: 1}


def test_one_step_at_a_time(rig, greedy) -> None:
    one = rig("llama")
    request = one.add(greedy(PROMPT))
    one.executor.plan([request])
    with pytest.raises(AssertionError, match="under way"):
        one.executor.plan([request])


def test_requests_may_come_while_a_step_runs(rig, greedy) -> None:
    one = rig("llama")
    first = one.add(greedy(PROMPT))
    step = one.executor.plan([first])
    second = one.add(greedy((1, 2)))
    result = one.executor.finish(step, one.runner.run(step, OpenGate()))
    assert [output.request for output in result.outputs] == [first]
    one.executor.drop(second)
    assert one.step([first, second]).batch_size == 1


def test_moves_are_given_and_not_made(rig, greedy) -> None:
    one = rig("llama")
    requests = [one.add(greedy(PROMPT)) for _ in range(12)]
    one.step(requests)
    for request in requests[:6]:
        one.executor.drop(request)
    before = one.cache.clone()
    assert int(one.executor.blocks_per_frame) == 10
    assert one.executor.set_cache(1) == {10: 0, 11: 1}
    assert torch.equal(one.cache, before)
    step = one.executor.plan(requests)
    assert step.parts[0].blocks.tolist() == [6, 7, 8, 9, 0, 1]


def test_a_single_pass_step_can_be_planned_again(random_checkpoint, load, new_rig) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    one = new_rig(load(random_checkpoint(AutoModel, config)[1], task="embed"))
    request = one.add(EmbedJob((1, 2, 3)))
    step = one.executor.plan([request])
    one.executor.abandon(step)
    assert one.step([request]).finished == (request,)
    assert one.executor.plan([request]) is None
    assert one.executor.empty_result().outputs == []
