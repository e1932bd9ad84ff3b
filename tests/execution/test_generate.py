"""What a request of a generating model gets, and what happens when something goes wrong."""

from __future__ import annotations

import pytest
import torch

from computron.errors import BadRequest, ContextTooLong, ExecutionFailed, OutOfMemory, SwapFailed
from computron.execution.requests import EmbedJob, FailedOutput, GenerateJob, SamplingParams

PROMPT = (39, 68, 75, 75, 78)  # "Hello" in the tokenizer of bytes


class ClosedGate:
    """A swap under way whose transfer fails at a segment, the first time."""

    is_open = False

    def __init__(self, failing: int) -> None:
        self.failing: int | None = failing
        self.waited: list[int] = []

    def wait(self, segment: int, stream: int = 0) -> None:
        self.waited.append(segment)
        if segment == self.failing:
            self.failing = None
            raise SwapFailed("the link is down")


@pytest.fixture
def answer(rig, greedy):
    """The greedy answer to PROMPT with these settings."""
    one = rig("llama")

    def ask(max_tokens: int = 12, **settings: object):
        return one.run([greedy(PROMPT, max_tokens, **settings)])[0]

    return ask


def test_an_answer_ends_at_its_length(answer) -> None:
    full = answer(12)
    assert len(full.tokens) == 12
    assert full.finish == ("length", None)
    assert full.text == "".join(output.text for output in full.texts)


def test_an_answer_ends_at_a_stop_token(answer) -> None:
    tokens = answer().tokens
    stop = tokens[3]
    short = answer(stop_token_ids=(stop,))
    assert short.tokens == tokens[: tokens.index(stop) + 1]
    assert short.finish == ("stop", stop)


def test_the_stop_token_is_in_the_text_only_if_asked(rig, greedy) -> None:
    one = rig("llama")
    tokens = one.run([greedy(PROMPT)])[0].tokens
    stop = tokens[3]
    length = tokens.index(stop) + 1
    kept = one.run([greedy(PROMPT, stop_token_ids=(stop,), include_stop=True)])[0]
    cut = one.run([greedy(PROMPT, stop_token_ids=(stop,))])[0]
    assert kept.text == text_after(one, tokens[:length])
    assert cut.text == text_after(one, tokens[: length - 1])


def text_after(one, tokens: list[int]) -> str:
    return one.model.decode([*PROMPT, *tokens]).removeprefix("Hello").rstrip("\N{REPLACEMENT CHARACTER}")


def test_an_answer_ends_at_eos_unless_that_is_ignored(rig, greedy) -> None:
    one = rig("llama")
    tokens = one.run([greedy(PROMPT)])[0].tokens
    eos = tokens[2]
    one.executor._text.eos = frozenset({eos})
    ended = one.run([greedy(PROMPT)])[0]
    assert ended.finish == ("stop", None)
    assert ended.tokens == tokens[: tokens.index(eos) + 1]
    assert one.run([greedy(PROMPT, ignore_eos=True)])[0].tokens == tokens
    later = one.run([greedy(PROMPT, min_tokens=6)])[0].tokens
    assert eos not in later[:5]
    assert len(later) >= 6


def test_an_answer_ends_before_a_stop_string(answer) -> None:
    text = answer(24).text
    stop = text[6:9]
    found = text.index(stop)
    cut = answer(24, stop=("never this", stop))
    assert cut.text == text[:found]
    assert cut.finish == ("stop", stop)
    assert answer(24, stop=(stop,), include_stop=True).text == text[: found + 3]


def test_the_least_length_holds_before_a_stop_string(answer) -> None:
    text = answer(24).text
    assert len(answer(24, stop=(text[1],), min_tokens=10).tokens) > 10


def test_a_context_that_is_full_ends_the_answer(rig, greedy) -> None:
    one = rig("llama", max_model_len=20)
    full = one.run([greedy(PROMPT, 100)])[0]
    assert len(full.tokens) == 15
    assert full.finish == ("length", None)


def test_log_probabilities_are_those_of_a_plain_forward(rig, greedy) -> None:
    one = rig("llama")
    both = one.run([greedy(PROMPT, 5, logprobs=3, prompt_logprobs=2), greedy((1, 2, 3), 5)])[0]
    module = rig("llama").model.module
    module.set_attn_implementation("sdpa")
    ids = torch.tensor([[*PROMPT, *both.tokens]])
    with torch.inference_mode():
        expected = torch.log_softmax(module(ids, use_cache=False).logits[0], -1)
    for place, each in enumerate(both.logprobs, len(PROMPT) - 1):
        assert each.logprob == pytest.approx(expected[place, each.token].item(), abs=1e-4)
        assert [token for token, _, _ in each.top] == expected[place].topk(3).indices.tolist()
        assert each.text == one.executor._text._text(each.token)
    prompt = both.texts[0].prompt_logprobs
    assert prompt[0] is None
    assert [each.token for each in prompt[1:]] == list(PROMPT[1:])
    for place, each in enumerate(prompt[1:]):
        assert each.logprob == pytest.approx(expected[place, each.token].item(), abs=1e-4)
        assert len(each.top) == 2
    assert all(output.prompt_logprobs is None for output in both.texts[1:])


def test_log_probabilities_of_a_prompt_in_chunks_and_preempted(rig, greedy, prompts, monkeypatch) -> None:
    monkeypatch.setattr("computron.execution.sequence.PROMPT_LOGPROBS_CHUNK", 20)
    one = rig("llama")
    job = greedy(prompts[-1], 3, prompt_logprobs=1)

    def preempt_twice(step: int, running: list[int]) -> None:
        if step in (2, 6):
            one.executor.preempt(running[0])

    whole = one.run([job])[0].texts[0].prompt_logprobs
    assert [each.token for each in whole[1:]] == prompts[-1][1:]
    again = one.run([job], preempt_twice)[0]
    assert [output.prompt_logprobs is not None for output in again.texts] == [True, False, False]
    assert [each.logprob for each in again.texts[0].prompt_logprobs[1:]] == pytest.approx(
        [each.logprob for each in whole[1:]], abs=1e-4
    )


def test_a_prompt_can_be_scored_without_an_answer(rig, greedy) -> None:
    scored = rig("llama").run([greedy(PROMPT, 0, prompt_logprobs=0)])[0]
    assert scored.tokens == []
    assert scored.finish == ("length", None)
    assert len(scored.texts[0].prompt_logprobs) == len(PROMPT)


def test_a_seed_gives_the_same_answer_in_any_batch(rig, greedy, prompts) -> None:
    one = rig("llama")
    job = GenerateJob(PROMPT, SamplingParams(12, temperature=1.0, seed=42, top_p=0.95))
    others = [GenerateJob(tuple(prompt), SamplingParams(9, temperature=1.3)) for prompt in prompts[:6]]
    alone = one.run([job])[0].tokens
    assert one.run([*others[:3], job, *others[3:], greedy(prompts[8])])[3].tokens == alone
    seeds = [GenerateJob(PROMPT, SamplingParams(12, temperature=1.0, seed=seed)) for seed in (-1, 0, 2**63)]
    assert len({tuple(each.tokens) for each in one.run(seeds)}) == 3


def test_a_preempted_sample_goes_on_as_it_would_have(rig) -> None:
    one = rig("llama")
    job = GenerateJob(PROMPT, SamplingParams(12, temperature=1.0, seed=42, presence_penalty=0.5))

    def preempt(step: int, running: list[int]) -> None:
        if step == 5:
            one.executor.preempt(running[0])

    assert one.run([job], preempt)[0].tokens == one.run([job])[0].tokens


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ((), {}, BadRequest, "empty"),
        ((1, 300), {}, BadRequest, "token id 300 is outside the vocabulary, 0 to 299"),
        ((-1,), {}, BadRequest, "token id -1"),
        ((1,), {"logit_bias": {999: 1.0}}, BadRequest, "999"),
        ((1,), {"stop_token_ids": (300,)}, BadRequest, "300"),
        ((1,) * 32, {}, ContextTooLong, "32 tokens; this model takes 32"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(rig, prompt, params, error, words) -> None:
    one = rig("llama", max_model_len=32)
    with pytest.raises(error, match=words):
        one.executor.prepare(GenerateJob(prompt, SamplingParams(4, **params)))


def test_a_prompt_that_the_cache_can_never_hold_is_refused(rig, greedy) -> None:
    one = rig("llama", cache_bytes=1 << 16)
    capacity = int(one.executor.blocks_per_frame) * 16
    one.executor.prepare(greedy((1,) * (capacity - 1)))
    assert one.executor.max_len == capacity
    with pytest.raises(ContextTooLong, match=f"the prompt has {capacity} tokens; this model takes {capacity}"):
        one.executor.prepare(greedy((1,) * capacity))


def test_an_answer_ends_where_the_cache_can_hold_no_more(rig, greedy) -> None:
    one = rig("llama", cache_bytes=1 << 16)
    capacity = one.executor.max_len
    assert capacity < one.model.plan.max_model_len
    answer = one.run([greedy((1,) * (capacity - 10), 1000, ignore_eos=True)])[0]
    assert (len(answer.tokens), answer.finish) == (10, ("length", None))


def test_other_kinds_of_jobs_are_refused(rig) -> None:
    with pytest.raises(BadRequest, match="generates text"):
        rig("llama").executor.prepare(EmbedJob((1,)))


def test_blocks_are_foretold_exactly(rig, greedy, prompts) -> None:
    one = rig("llama", max_batch_tokens=30, max_batch_size=4)
    requests = {one.add(greedy(prompt, 20)): one.executor.prepare(greedy(prompt)) for prompt in prompts[-4:]}
    foretold = dict(requests)
    running = list(requests)
    while running:
        result = one.step(running)
        for request, sequence in one.executor._sequences.items():
            assert len(sequence.blocks) <= foretold[request]
        assert set(result.cache_blocks) <= set(running) - set(result.finished)
        foretold |= result.cache_blocks
        running = [request for request in running if request not in result.finished]
    assert not one.executor._allocator.used


def test_a_dropped_request_frees_its_blocks(rig, greedy, prompts, reference) -> None:
    one = rig("llama")
    kept, dropped = one.add(greedy(prompts[-1])), one.add(greedy(prompts[-2]))
    result = one.step([kept, dropped])
    used = len(one.executor._allocator.used)
    one.executor.drop(dropped)
    one.executor.drop(dropped)
    assert len(one.executor._allocator.used) == used - 4
    tokens = [token for output in result.outputs if output.request == kept for token in output.tokens]
    for _ in range(7):
        result = one.step([kept, dropped])
        tokens += result.outputs[0].tokens
    assert tokens == reference("llama", prompts[-1])
    assert result.finished == (kept,)


@pytest.mark.parametrize("segment", [0, 1, 2, 3, 4])
def test_a_step_whose_swap_fails_can_be_tried_again(segment, rig, greedy, prompts, reference) -> None:
    one = rig("llama")
    assert len(one.model.plan.stages) == 5
    chosen = prompts[10:14]
    requests = [one.add(greedy(prompt)) for prompt in chosen]
    tokens: dict[int, list[int]] = {request: [] for request in requests}
    for _ in range(8):
        gate = ClosedGate(segment)
        used = one.executor._allocator.used
        with pytest.raises(SwapFailed, match="the link is down"):
            one.step(requests, gate)
        assert one.executor._allocator.used == used
        for output in one.step(requests, gate).outputs:
            tokens[output.request] += output.tokens
        assert set(gate.waited) == {0, 1, 2, 3, 4}
    assert list(tokens.values()) == [reference("llama", prompt) for prompt in chosen]


def test_an_exception_of_the_model_fails_the_step_in_its_own_words(rig, greedy, monkeypatch) -> None:
    one = rig("llama")
    request = one.add(greedy(PROMPT))

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("no weights today")

    with monkeypatch.context() as patch:
        patch.setattr(one.model.module.model.norm, "forward", broken)
        with pytest.raises(ExecutionFailed, match="ZeroDivisionError: no weights today"):
            one.step([request])
    assert not one.executor._allocator.used
    assert len(one.step([request]).outputs) == 1


def test_logits_that_are_no_numbers_fail_that_request_alone(rig, greedy, reference, prompts) -> None:
    one = rig("llama")
    with torch.inference_mode():
        one.model.module.model.embed_tokens.weight[299] = torch.nan
    good, bad = one.run([greedy(prompts[4]), greedy((299,))])
    assert good.tokens == reference("llama", prompts[4])
    assert isinstance(bad.outputs[0], FailedOutput)
    assert "NaN" in bad.outputs[0].message


def test_a_cache_that_is_too_small_for_any_request_says_so(rig, greedy) -> None:
    one = rig("llama")
    request = one.add(greedy(PROMPT))
    one.set_cache(0)
    with pytest.raises(OutOfMemory, match="0 blocks"):
        one.step([request])
    one.set_cache(1)
    assert one.step([request]).batch_size == 1


def test_a_step_of_unknown_requests_does_nothing(rig) -> None:
    result = rig("llama").step([5])
    assert (result.outputs, result.finished, result.batch_size) == ([], (), 0)
