"""The choice of tokens, against transformers' logits processors."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from computron.execution import filters
from computron.execution.filters import FilterSettings, draw
from computron.execution.requests import SamplingParams
from computron.execution.sampling import UNUSABLE, SamplingState, rank, sample

VOCABULARY = 60

filter_settings = st.builds(
    FilterSettings,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 3, 20, VOCABULARY, 500]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


def random_logits(seed: int, rows: int = 1, *, rounded: bool = False) -> torch.Tensor:
    logits = torch.randn((rows, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 3
    return logits.bfloat16().float() if rounded else logits


def reference_probabilities(logits: torch.Tensor, setting: FilterSettings) -> torch.Tensor:
    processors = LogitsProcessorList([TemperatureLogitsWarper(setting.temperature)])
    if setting.top_k:
        processors.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p < 1:
        processors.append(TopPLogitsWarper(setting.top_p))
    if setting.min_p:
        processors.append(MinPLogitsWarper(setting.min_p))
    return torch.softmax(processors(torch.zeros((1, 1), dtype=torch.int64), logits), -1)[0]


@given(seed=st.integers(0, 1000), setting=filter_settings)
@settings(max_examples=120, deadline=None)
def test_tokens_come_as_often_as_transformers_says(seed: int, setting: FilterSettings) -> None:
    points = 1000
    logits = random_logits(seed)
    uniforms = [(point + 0.5) / points for point in range(points)]
    counts = Counter(draw(logits.expand(points, -1), [setting] * points, uniforms).tolist())
    expected = reference_probabilities(logits, setting)
    for token in range(VOCABULARY):
        assert abs(counts[token] - points * expected[token].item()) <= 1.01
        assert expected[token] > 0 or counts[token] == 0


@given(seed=st.integers(0, 1000), each=st.lists(filter_settings, min_size=1, max_size=6), rounded=st.booleans())
@settings(max_examples=120, deadline=None)
def test_looking_at_few_tokens_first_changes_nothing(seed: int, each: list[FilterSettings], rounded: bool) -> None:
    logits = random_logits(seed, len(each), rounded=rounded)
    uniforms = [(index + 0.37) / (len(each) + 1) for index in range(len(each))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "WIDTHS", ())
        whole = draw(logits, each, uniforms)
        patch.setattr(filters, "WIDTHS", (4, 16))
        assert_same_logits(logits, draw(logits, each, uniforms), whole)


def assert_same_logits(logits: torch.Tensor, tokens: torch.Tensor, others: torch.Tensor) -> None:
    """The order among equal logits is nobody's business."""
    assert torch.equal(logits.gather(1, tokens[:, None]), logits.gather(1, others[:, None]))


@given(seed=st.integers(0, 1000), each=st.lists(filter_settings, min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_its_neighbours(seed: int, each: list[FilterSettings]) -> None:
    logits = random_logits(seed, len(each))
    together = draw(logits, each, [0.4] * len(each))
    alone = [draw(logits[row : row + 1], [setting], [0.4]).item() for row, setting in enumerate(each)]
    assert together.tolist() == alone


def test_all_tokens_that_share_the_last_place_of_top_k_may_come() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    setting = FilterSettings(1.0, top_k=2)
    drawn = {draw(logits, [setting], [point / 100]).item() for point in range(100)}
    assert drawn == {0, 1, 2, 3}


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for setting in (FilterSettings(1.0), FilterSettings(1.0, top_k=4)):
        ends = [draw(logits, [setting], [point]).item() for point in (0.0, 1 - 1e-16)]
        assert set(ends) == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_give_no_token(temperature: float) -> None:
    logits = torch.stack([torch.full((VOCABULARY,), torch.nan), random_logits(1)[0]])
    states = [SamplingState(SamplingParams(1, temperature=temperature, top_k=5), [1], [], 0) for _ in range(2)]
    tokens = sample(logits, states)
    assert tokens[0] == UNUSABLE
    assert tokens[1] >= 0


def state(prompt: tuple[int, ...] = (1, 2), generated: tuple[int, ...] = (), **params: object) -> SamplingState:
    made = SamplingState(SamplingParams(50, **{"temperature": 0.0, **params}), prompt, [7, 9], seed=5)  # type: ignore[arg-type]
    for token in generated:
        made.append(token)
    return made


def adjusted(logits: torch.Tensor, made: SamplingState) -> torch.Tensor:
    row = logits[0].clone()
    if made.adjusts:
        made.adjust(row)
    return row


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(3)
    made = state((4, 5, 5), (6, 8, 6), repetition_penalty=1.3)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[4, 5, 5, 6, 8, 6]]), logits.clone())
    assert torch.allclose(adjusted(logits, made), expected[0])


def test_presence_and_frequency_count_answers_and_not_prompts() -> None:
    logits = random_logits(4)
    change = adjusted(logits, state((4, 5), (6, 8, 6), presence_penalty=0.5, frequency_penalty=0.2)) - logits[0]
    expected = torch.zeros(VOCABULARY)
    expected[6], expected[8] = -0.9, -0.7
    assert torch.allclose(change, expected, atol=1e-6)


def test_bias_is_added() -> None:
    logits = random_logits(5)
    assert sample(logits, [state(logit_bias={11: 100.0})]) == [11]
    assert logits.equal(random_logits(5))


def test_no_end_comes_before_the_least_length() -> None:
    logits = torch.zeros((1, VOCABULARY))
    logits[0, 7], logits[0, 9], logits[0, 3] = 9.0, 8.0, 1.0
    assert sample(logits, [state(generated=(1,), min_tokens=2)]) == [3]
    assert sample(logits, [state(generated=(1, 1), min_tokens=2)]) == [7]


def test_mixed_settings_share_a_batch() -> None:
    logits = random_logits(6, 4)
    states = [
        state(),
        state(temperature=1.0, seed=1, top_p=0.9),
        state(temperature=0.7, seed=2),
        state(repetition_penalty=2.0),
    ]
    alone = [sample(logits[row : row + 1], [made])[0] for row, made in enumerate(states)]
    assert sample(logits, states) == alone


def test_a_seed_fixes_the_draws_and_each_draw_is_another() -> None:
    first, second = state(temperature=1.0), state(temperature=1.0)
    draws = []
    for _ in range(50):
        assert first.uniform() == second.uniform()
        draws.append(first.uniform())
        first.append(1)
        second.append(2)
    assert len(set(draws)) == 50
    assert 0.3 < sum(draws) / 50 < 0.7


def test_log_probabilities_are_those_of_the_unchanged_logits() -> None:
    logits = random_logits(8, 2)
    expected = torch.log_softmax(logits, -1)
    ranked = rank(logits, [12, 13], [3, 0])
    assert ranked[0].token == 12
    assert ranked[0].logprob == pytest.approx(expected[0, 12].item())
    values, tokens = expected[0].topk(3)
    assert [token for token, _ in ranked[0].top] == tokens.tolist()
    assert [value for _, value in ranked[0].top] == pytest.approx(values.tolist())
    assert ranked[1].top == ()
