"""A step that is cut into parts, so that the stages of a pipeline overlap, gives what it would give whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computron.execution.packed_batch import Work, cut
from computron.execution.requests import FailedOutput, GenerateJob, SamplingParams
from computron.execution.sequence import Running


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr("computron.execution.packed_batch.LEAST_PART_TOKENS", 4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gpt_oss"])
@pytest.mark.parametrize("stages", [2, 3])
def test_greedy_tokens(name, stages, group, greedy, prompts, reference) -> None:
    nodes = group(name, stages, max_batch_tokens=70, max_batch_size=8)
    answers = nodes.run([greedy(prompt) for prompt in prompts])
    assert [answer.tokens for answer in answers] == [reference(name, prompt) for prompt in prompts]
    assert max(len(step.parts) for step in nodes.steps) == stages


def test_a_prompt_that_is_cut(group, rig, greedy, prompts, reference) -> None:
    nodes = group()
    first = nodes.add(greedy(prompts[7]))
    nodes.step([first])
    second = nodes.add(greedy(prompts[-1], prompt_logprobs=1))
    result = nodes.step([first, second])
    assert [part.lengths.tolist() for part in nodes.steps[-1].parts] == [[1, 45], [45]]
    assert nodes.steps[-1].parts[1].starts.tolist() == [45]
    assert (result.batch_size, result.tokens) == (2, 91)
    tokens = {output.request: output.tokens for output in result.outputs}
    assert tokens == {
        first: (reference("llama", prompts[7])[1],),
        second: (reference("llama", prompts[-1])[0],),
    }
    (scored,) = [output.prompt_logprobs for output in result.outputs if output.request == second]
    (whole,) = rig("llama").run([greedy(prompts[-1], prompt_logprobs=1)])
    assert [each.logprob for each in scored[1:]] == pytest.approx(
        [each.logprob for each in whole.texts[0].prompt_logprobs[1:]], abs=1e-4
    )


def test_samples(group, rig, prompts) -> None:
    jobs = [
        GenerateJob(tuple(prompt), SamplingParams(5, temperature=1.0, seed=index, logprobs=1))
        for index, prompt in enumerate(prompts[8:])
    ]
    given = [answer.tokens for answer in group(max_batch_size=20).run(jobs)]
    assert given == [answer.tokens for answer in rig("llama", max_batch_size=20).run(jobs)]


def test_a_request_that_fails_in_one_part_is_over(group, greedy, prompts, reference, monkeypatch) -> None:
    nodes = group()
    good, bad = nodes.add(greedy(prompts[-2])), nodes.add(greedy(prompts[-1], prompt_logprobs=0))

    def broken(ranked: object) -> None:
        raise UnicodeError("no text")

    monkeypatch.setattr(nodes.executor._text, "describe", broken)
    result = nodes.step([good, bad])
    assert [sorted(part.lengths.tolist()) for part in nodes.steps[-1].parts] == [[13, 64], [77]]
    failed = [output for output in result.outputs if isinstance(output, FailedOutput)]
    assert [(output.request, "no text" in output.message) for output in failed] == [(bad, True)]
    assert result.finished == (bad,)
    assert set(result.cache_blocks) == {good}
    assert [output.tokens for output in result.outputs if output.request == good] == [
        (reference("llama", prompts[-2])[0],)
    ]


def test_a_node_alone_cuts_nothing(rig, greedy, prompts) -> None:
    one = rig("llama")
    step = one.executor.plan([one.add(greedy(prompt)) for prompt in prompts])
    assert len(step.parts) == 1


@given(
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=30),
    most=st.integers(1, 5),
    least=st.integers(1, 40),
)
def test_parts_hold_all_tokens_once_and_in_order(lengths: list[int], most: int, least: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("computron.execution.packed_batch.LEAST_PART_TOKENS", least)
        works = [Work(sequence(number, 7 + length), 7, length) for number, length in enumerate(lengths)]
        parts = cut(works, most)
    assert 1 <= len(parts) <= most
    pieces: dict[int, list[int]] = {number: [] for number in range(len(lengths))}
    for part in parts:
        assert part
        numbers = [work.sequence.request for work in part]
        assert len(set(numbers)) == len(numbers)
        for work in part:
            pieces[work.sequence.request] += range(work.start, work.end)
    assert pieces == {number: list(range(7, 7 + length)) for number, length in enumerate(lengths)}
    singles = lengths.count(1)
    assert all(work.length == 1 and work.start == 7 for work in sorted(parts[0], key=lambda w: w.length)[:singles])
    count = min(most, sum(lengths) // least)
    if count < 2:
        assert len(parts) == 1
    elif singles * count <= sum(lengths):
        assert len(parts) == count
    if len(parts) > 1:
        sizes = [sum(work.length for work in part) for part in parts]
        assert count > 1
        assert max(sizes[1:]) <= -(-sum(lengths) // 2)
        assert max(sizes[1:]) - min(sizes[1:]) <= 1


def sequence(number: int, tokens: int) -> Running:
    job = GenerateJob((1,) * tokens, SamplingParams(4))
    return Running(number, job, limit=1000, eos=frozenset(), seed=1, decode=lambda ids: "")
