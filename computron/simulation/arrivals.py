"""Synthetic requests: Gamma arrivals, Zipf popularity, lengths from a distribution. Same settings, same requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray

from computron.simulation.workload import Arrival, Workload

Times = NDArray[np.float64]
Counts = NDArray[np.int64]

_TIMES, _LENGTHS = 0, 1  # the random streams of a model
MAX_CV = 100.0  # above it nearly all intervals are 0, and a model's first request brings thousands with it
MIN_CV = 1e-6  # below it intervals are the same but for rounding
MAX_REQUESTS = 1e8  # some GB of memory


class Lengths(Protocol):
    """Numbers of tokens, each at least 1."""

    def draw(self, generator: Generator, count: int) -> Counts: ...


@dataclass(frozen=True, slots=True)
class Constant:
    tokens: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a length must be at least 1 token, not {self.tokens}")

    def draw(self, generator: Generator, count: int) -> Counts:
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """mean, sd: of the lengths themselves, before they are rounded and brought between `low` and `high`."""

    mean: float
    sd: float
    low: int = 1
    high: int = 32_768

    def __post_init__(self) -> None:
        possible = 0.0 < self.mean < math.inf and 0.0 <= self.sd < math.inf
        if not possible or not 1 <= self.low <= self.high:
            raise ValueError(
                f"no log-normal lengths have mean {self.mean:g}, sd {self.sd:g}, {self.low} to {self.high}"
            )

    def draw(self, generator: Generator, count: int) -> Counts:
        variance = math.log1p((self.sd / self.mean) ** 2)
        drawn = generator.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Empirical:
    """Any of `lengths`, each as likely as the next: those of a trace, say."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError("empirical lengths need at least one value, and each must be at least 1 token")

    def draw(self, generator: Generator, count: int) -> Counts:
        return generator.choice(np.asarray(self.lengths, dtype=np.int64), count)


@dataclass(frozen=True, slots=True)
class Settings:
    """rates: requests a second of each model. cv: standard deviation over mean of the times between them.

    prompt_tokens, output_tokens: the same distributions for all models, drawn independently.
    """

    rates: Mapping[str, float]
    duration: float
    cv: float = 1.0
    seed: int = 0
    prompt_tokens: Lengths = Constant()
    output_tokens: Lengths = Constant()

    def __post_init__(self) -> None:
        if not self.rates:
            raise ValueError("a workload needs at least one model")
        for model, rate in self.rates.items():
            if not (0 <= rate < math.inf):
                raise ValueError(f"{model}: the rate must be a number of requests a second, not {rate:g}")
        if not (0 < self.duration < math.inf):
            raise ValueError(f"the duration must be more than 0 seconds, not {self.duration:g}")
        if not (0 <= self.cv <= MAX_CV):
            raise ValueError(f"the coefficient of variation must be from 0 to {MAX_CV:g}, not {self.cv:g}")
        expected = sum(self.rates.values()) * self.duration
        if expected > MAX_REQUESTS:
            raise ValueError(f"{expected:.3g} requests are more than can be simulated ({MAX_REQUESTS:g})")


def zipf(models: Sequence[str], rate: float, exponent: float) -> dict[str, float]:
    """`rate` over `models`: the one at place k, from 1, gets a share in proportion to k ** -exponent."""
    weights = popularity(len(models), exponent)
    return {model: rate * float(weight) for model, weight in zip(models, weights, strict=True)}


def popularity(models: int, exponent: float) -> Times:
    """Shares that sum to 1, the largest first. Raises ValueError for an exponent that gives none."""
    with np.errstate(over="ignore"):
        weights = np.arange(1, models + 1, dtype=np.float64) ** -exponent
        total = float(weights.sum())
    if not math.isfinite(total):
        raise ValueError(f"models cannot be as unequal as by Zipf's exponent {exponent:g}")
    shares: Times = weights / total
    return shares


def gamma_times(generator: Generator, rate: float, cv: float, duration: float) -> Times:
    """Arrivals in [0, duration): times between them are Gamma distributed, shape 1/cv^2, scale cv^2/rate.

    The first interval begins at 0, as if a request had just come; so that at a high `cv` somewhat more than
    rate * duration requests come (by (cv^2 - 1)/2 in the long run), as in the published workloads.
    """
    if rate == 0:
        return np.empty(0)
    parts: list[Times] = []
    now = 0.0
    while now < duration:
        expected = rate * (duration - now)
        count = math.ceil(expected + 4 * cv * math.sqrt(expected)) + 1  # enough nearly always
        between = generator.gamma(cv**-2, cv**2 / rate, count) if cv > MIN_CV else np.full(count, 1 / rate)
        parts.append(now + np.cumsum(between))
        now = float(parts[-1][-1])
    times = np.concatenate(parts)
    return times[: int(np.searchsorted(times, duration))]


def generate(settings: Settings, name: str = "gamma") -> Workload:
    """The requests, in order of time; those of one instant in the order of `rates`.

    Every model has random streams of its own, by its place in `rates`: another model behind it, another rate of one
    before it or other lengths change none of its times.
    """
    times, prompts, outputs = [], [], []
    for place, rate in enumerate(settings.rates.values()):
        come = gamma_times(_stream(settings.seed, place, _TIMES), rate, settings.cv, settings.duration)
        lengths = _stream(settings.seed, place, _LENGTHS)
        times.append(come)
        prompts.append(settings.prompt_tokens.draw(lengths, len(come)))
        outputs.append(settings.output_tokens.draw(lengths, len(come)))
    models = tuple(settings.rates)
    which = np.repeat(np.arange(len(models)), [len(come) for come in times])
    all_times = np.concatenate(times)
    order = np.argsort(all_times, kind="stable")
    arrivals = map(
        Arrival,
        all_times[order].tolist(),
        map(models.__getitem__, which[order].tolist()),
        np.concatenate(prompts)[order].tolist(),
        np.concatenate(outputs)[order].tolist(),
    )
    return Workload(name, models, tuple(arrivals), _described(settings))


def _stream(seed: int, place: int, purpose: int) -> Generator:
    return default_rng(SeedSequence(seed, spawn_key=(place, purpose)))


def _described(settings: Settings) -> dict[str, object]:
    return {
        "rates": dict(settings.rates),
        "duration": settings.duration,
        "cv": settings.cv,
        "seed": settings.seed,
        "prompt_tokens": _length(settings.prompt_tokens),
        "output_tokens": _length(settings.output_tokens),
    }


def _length(lengths: Lengths) -> object:
    if isinstance(lengths, Empirical):
        return {"of": len(lengths.lengths), "mean": float(np.mean(lengths.lengths))}
    return asdict(lengths) if isinstance(lengths, Constant | LogNormal) else repr(lengths)
