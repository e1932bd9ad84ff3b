"""What is fitted to sums of steps."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from computron.profiling.fit import Timed, Work, fit, non_negative_least_squares
from computron.profiling.link import Load, fit_link
from computron.profiling.shapes import Shape, shapes_for
from computron.profiling.steps import GENERATES, READS
from computron.simulation.hardware import StepTime

TRUE = StepTime(0.01, per_prompt_token=2e-4, per_sequence=1e-3, per_context_token=3e-6, opening=4e-3)


def seconds_of(step: StepTime, work: Work) -> float:
    """Of the steps together, each term by itself."""
    return (
        step.base * work.steps
        + step.opening * work.openings
        + step.per_prompt_token * work.prompt_tokens
        + step.per_sequence * work.sequences
        + step.per_context_token * work.context_tokens
    )


def calls(step: StepTime, task: str, noise: float = 0.0) -> list[Timed]:
    generator = np.random.default_rng(0)
    works = [(shape.name, shape.work(shape.steps)) for shape in shapes_for(task, 8, 512, 2048)]
    return [Timed(name, work, seconds_of(step, work) * generator.normal(1.0, noise), 3) for name, work in works]


def test_known_coefficients_are_found() -> None:
    fitted = fit(calls(TRUE, "generate"), GENERATES)
    assert astuple(fitted.step) == pytest.approx(astuple(TRUE))
    assert fitted.worst_error < 1e-6


def test_noise_moves_what_is_foretold_by_little() -> None:
    fitted = fit(calls(TRUE, "generate", noise=0.05), GENERATES)
    for work in (Work(1, 1, 64, 1, 0), Work(50, 1, 64, 50, 50 * 90), Work(8, 8, 256, 32, 0)):
        assert seconds_of(fitted.step, work) == pytest.approx(seconds_of(TRUE, work), rel=0.1)


def test_terms_that_are_not_sought_stay_zero() -> None:
    step = StepTime(0.004, per_prompt_token=1e-4, per_sequence=5e-4)
    fitted = fit(calls(step, "embed"), READS)
    assert astuple(fitted.step) == pytest.approx(astuple(step))


def test_no_coefficient_is_negative() -> None:
    falling = [Timed("", Work(1, 1, tokens, 1, 0), 0.02 - 1e-4 * tokens, 3) for tokens in (10, 50, 100)]
    fitted = fit(falling, ("base", "per_prompt_token"))
    assert fitted.step.per_prompt_token == 0.0
    assert 0.01 < fitted.step.base < 0.02


def test_nothing_to_fit_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to fit"):
        fit([], GENERATES)


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_are_the_least(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, wanted = generator.normal(size=(12, 4)), generator.normal(size=12)
    found = non_negative_least_squares(rows, wanted)
    assert (found >= 0).all()
    best = float(np.sum((rows @ found - wanted) ** 2))
    for _ in range(200):
        other = np.maximum(0.0, found + generator.normal(scale=0.1, size=4))
        assert float(np.sum((rows @ other - wanted) ** 2)) >= best - 1e-12


def test_link_of_several_sizes_has_a_latency() -> None:
    link = fit_link([Load(str(size), size, 0.002 + size / 4e9) for size in (10_000_000, 50_000_000, 300_000_000)])
    assert (link.bandwidth, link.latency) == (pytest.approx(4e9), pytest.approx(0.002))


def test_each_piece_of_a_load_has_the_latency() -> None:
    link = fit_link([Load("a", 10_000_000, 0.002 + 0.0025), Load("b", 300_000_000, 4 * 0.002 + 0.075, swaps=4)])
    assert (link.bandwidth, link.latency) == (pytest.approx(4e9), pytest.approx(0.002))


def test_loads_in_pieces_of_one_size_tell_the_bandwidth_alone() -> None:
    link = fit_link([Load("a", 100_000_000, 0.05, swaps=2), Load("b", 1_000_000_000, 0.5, swaps=20)])
    assert (link.bandwidth, link.latency) == (pytest.approx(2e9), 0.0)


def test_loads_of_one_size_tell_the_bandwidth_alone() -> None:
    link = fit_link([Load("a", 100_000_000, 0.05), Load("b", 100_000_000, 0.06), Load("c", 110_000_000, 0.05)])
    assert (link.bandwidth, link.latency) == (pytest.approx(2e9), 0.0)


@pytest.mark.parametrize("shape", [Shape(1, 16), Shape(5, 16), Shape(1, 16, 12), Shape(3, 16, 12)])
def test_work_of_a_call_is_that_of_its_steps(shape: Shape) -> None:
    """Step by step: the first request alone, the others one step later."""
    ages = [-start for start in (0, *[1] * (shape.batch - 1))]  # steps that each request has been in
    steps = openings = prompt = sequences = context = 0
    while any(age < shape.output_tokens for age in ages):
        present = [age for age in ages if 0 <= age < shape.output_tokens]
        steps += 1
        openings += 0 in present
        sequences += len(present)
        prompt += shape.prompt_tokens * present.count(0)
        context += sum(shape.prompt_tokens + age for age in present if age)
        ages = [age + 1 for age in ages]
    assert steps == shape.steps
    assert shape.work(steps) == Work(steps, openings, prompt, sequences, context)


def test_calls_keep_within_what_the_model_takes() -> None:
    for shape in shapes_for("generate", 2, 64, 256):
        assert shape.prompt_tokens + shape.output_tokens <= 64
        assert shape.batch <= 3  # one ahead, and a full step
        assert shape.batch * shape.prompt_tokens <= 256
