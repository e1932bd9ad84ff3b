from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from computron.simulation.arrivals import (
    Constant,
    Empirical,
    LogNormal,
    Settings,
    gamma_times,
    generate,
    popularity,
    zipf,
)


def times_of(workload, model):
    return [a.time for a in workload.arrivals if a.model == model]


def drawn(lengths, count=20_000, seed=0):
    return lengths.draw(np.random.default_rng(seed), count)


@pytest.mark.parametrize("cv", [0.25, 1.0, 4.0])
def test_intervals_have_the_mean_and_the_variation_that_were_asked_for(cv):
    between = np.diff(gamma_times(np.random.default_rng(1), 20.0, cv, 5_000.0))
    assert between.mean() == pytest.approx(1 / 20, rel=0.05)
    assert between.std() / between.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("cv", [0.0, 1e-200])
def test_without_variation_arrivals_are_regular(cv):
    times = gamma_times(np.random.default_rng(0), 4.0, cv, 2.0)
    assert times.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75])


def test_arrivals_are_in_order_within_the_duration_and_as_seeded():
    settings = Settings({"a": 50.0, "b": 5.0, "c": 0.0}, duration=10.0, cv=2.0, seed=7)
    workload = generate(settings)
    times = [a.time for a in workload.arrivals]
    assert times == sorted(times)
    assert 0 < times[0] <= times[-1] < 10
    assert workload.models == ("a", "b", "c")
    assert not times_of(workload, "c")
    assert generate(settings) == workload
    assert generate(Settings({"a": 50.0, "b": 5.0, "c": 0.0}, 10.0, cv=2.0, seed=8)).arrivals != workload.arrivals


def test_a_models_times_depend_neither_on_other_models_nor_on_lengths():
    alone = generate(Settings({"a": 5.0, "b": 5.0}, 20.0))
    beside = generate(Settings({"a": 9.0, "b": 5.0, "c": 5.0}, 20.0, prompt_tokens=LogNormal(100, 50)))
    assert times_of(alone, "b") == times_of(beside, "b")
    assert times_of(alone, "a") != times_of(alone, "b")


def test_popularity_follows_zipf():
    rates = zipf(["a", "b", "c"], 11.0, 1.0)
    assert rates == pytest.approx({"a": 6.0, "b": 3.0, "c": 2.0})
    assert popularity(4, 0.0).tolist() == pytest.approx([0.25] * 4)


def test_lognormal_lengths_have_their_mean_and_deviation_and_stay_within_bounds():
    lengths = drawn(LogNormal(200, 100))
    assert lengths.mean() == pytest.approx(200, rel=0.02)
    assert lengths.std() == pytest.approx(100, rel=0.05)
    clipped = drawn(LogNormal(200, 400, low=50, high=300))
    assert (clipped.min(), clipped.max()) == (50, 300)


def test_constant_and_empirical_lengths():
    assert set(drawn(Constant(5)).tolist()) == {5}
    counts = Counter(drawn(Empirical((3, 3, 9))).tolist())
    assert counts[3] / counts[9] == pytest.approx(2, rel=0.1)
    assert set(counts) == {3, 9}


def test_prompt_and_output_lengths_are_drawn_independently():
    workload = generate(
        Settings({"a": 100.0}, 20.0, prompt_tokens=LogNormal(100, 50), output_tokens=LogNormal(100, 50))
    )
    prompts = [a.prompt_tokens for a in workload.arrivals]
    outputs = [a.output_tokens for a in workload.arrivals]
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.1


def test_a_workload_tells_how_it_was_made():
    settings = Settings({"a": 1.0}, 3.0, cv=2.0, seed=4, prompt_tokens=Empirical((1, 3)), output_tokens=Constant(7))
    assert generate(settings).settings == {
        "rates": {"a": 1.0}, "duration": 3.0, "cv": 2.0, "seed": 4,
        "prompt_tokens": {"of": 2, "mean": 2.0}, "output_tokens": {"tokens": 7},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Settings({}, 1.0), "at least one model"),
        (lambda: Settings({"a": -1.0}, 1.0), "a: the rate"),
        (lambda: Settings({"a": 1.0}, 0.0), "duration must be more than 0"),
        (lambda: Settings({"a": 1.0}, 1.0, cv=-1.0), "coefficient of variation"),
        (lambda: Settings({"a": 1.0}, 1.0, cv=1e9), "coefficient of variation must be from 0 to 100"),
        (lambda: Settings({"a": 1e12}, 60.0), r"6e\+13 requests are more than can be simulated"),
        (lambda: zipf(["a", "b", "c"], 1.0, -1000.0), "exponent -1000"),
        (lambda: zipf(["a", "b", "c"], 1.0, math.nan), "exponent nan"),
        (lambda: Constant(0), "at least 1 token"),
        (lambda: Empirical(()), "at least one value"),
        (lambda: LogNormal(0.0, 1.0), "mean 0"),
        (lambda: LogNormal(math.nan, 1.0), "mean nan"),
        (lambda: LogNormal(1.0, math.inf), "sd inf"),
        (lambda: LogNormal(5.0, 1.0, low=9, high=8), "9 to 8"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_bursts_are_longer_with_more_variation():
    def most_in_a_second(cv):
        times = times_of(generate(Settings({"a": 10.0}, 100.0, cv=cv)), "a")
        return max(len(list(group)) for _, group in itertools.groupby(times, key=int))

    assert most_in_a_second(0.25) < most_in_a_second(1.0) < most_in_a_second(4.0)
