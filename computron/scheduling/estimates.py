"""What the scheduler has learnt from the past: the link, the steps of each model, the arrivals of each model."""

from __future__ import annotations

import math
from functools import cache

from computron.scheduling.tuning import Tuning

POISSON = 2.0  # the mean square of the intervals of a Poisson process, whose mean is 1


class Mean:
    """The plain mean of the first samples, and from 1 / `weight` samples on an exponentially weighted one.

    None before the first sample.
    """

    __slots__ = ("_count", "_weight", "value")

    def __init__(self, weight: float, value: float | None = None) -> None:
        self._weight = weight
        self._count = 0 if value is None else 1
        self.value = value

    def add(self, sample: float) -> None:
        self._count += 1
        if self.value is None:
            self.value = sample
        else:
            self.value += max(self._weight, 1.0 / self._count) * (sample - self.value)


class Arrivals:
    """When will the next request come? Mean and variation of the intervals between requests, and the last one.

    usual: the mean square of all models' intervals, each as a multiple of its model's mean. A model of which little has
    been seen is taken to vary as the others do.
    """

    __slots__ = ("_distribution", "_interval", "_last", "_square", "_tuning", "_usual", "count", "variation")

    def __init__(self, tuning: Tuning, usual: Mean) -> None:
        self._tuning = tuning
        self._usual = usual
        self._last: float | None = None
        self.count = 0
        self._interval = Mean(tuning.smoothing)
        self._square = Mean(tuning.smoothing)
        self.variation = 1.0  # squared coefficient of variation of the intervals
        self._distribution = distribution(1.0)

    def add(self, now: float) -> None:
        if self._last is not None and self.count:
            interval = now - self._last
            if self._interval.value:
                self._usual.add(min((interval / self._interval.value) ** 2, 1.0 + self._tuning.max_variation))
            self._interval.add(interval)
            self._square.add(interval * interval)
            self.variation = self._estimate()
            self._distribution = distribution(self.variation)
        self._last = now
        self.count += 1

    def expect(self, now: float) -> None:
        """Somebody expects requests, which counts as one as long as none has come."""
        if self.count == 0:
            self._last = now

    @property
    def rate(self) -> float:
        """Requests a second, 0 while fewer than two have come."""
        mean = self._interval.value
        return 1.0 / mean if mean else 0.0

    def silence(self, now: float) -> float:
        """Seconds since the last request; 0 if there was none."""
        return 0.0 if self._last is None else max(0.0, now - self._last)

    def chance(self, within: float, now: float) -> float:
        """How likely the next request comes within so many seconds; 0 for a model that never had one.

        The longer a model has been silent, the more its past is doubted: where requests come at random or regularly the
        silence counts on top of the mean interval, and after a long one there is nothing else to go by.
        """
        if self._last is None:
            return 0.0
        silence = now - self._last if now > self._last else 0.0
        mean, variation = self._interval.value, self.variation
        if mean:
            if variation <= 1.0:
                mean += variation * silence
            if silence <= self._tuning.quiet * mean * (variation if variation > 1.0 else 1.0):
                shape, scale = self._distribution
                return soon(shape, scale * mean, silence, within)
        return 1.0 - math.exp(-within / silence) if silence else 1.0

    def regular_next(self) -> float | None:
        """When the next request will come, if they come so regularly that this can be said."""
        mean = self._interval.value
        if self._last is None or not mean or self.variation > self._tuning.regular:
            return None
        return self._last + mean

    def _estimate(self) -> float:
        mean, square, usual = self._interval.value, self._square.value, self._usual.value
        assert mean is not None
        assert square is not None
        assert usual is not None
        if mean * mean == 0.0:
            return 1.0
        prior = self._tuning.prior
        relative = (self.count * square / (mean * mean) + prior * usual) / (self.count + prior)
        return min(max(0.0, relative - 1.0), self._tuning.max_variation)


def soon(shape: float, scale: float, elapsed: float, within: float) -> float:
    """How likely a renewal process has its next event within so many seconds, none having come for `elapsed`.

    Its intervals are taken to be Weibull's, whose survival exp(-(time / scale) ** shape) costs little. Regular events
    (shape above 1) become the more likely the longer one waits for them, those of bursts less likely once it is over.
    """
    return 1.0 - math.exp((elapsed / scale) ** shape - ((elapsed + within) / scale) ** shape)


def distribution(variation: float) -> tuple[float, float]:
    """Shape and scale of the Weibull distribution of mean 1 and about this squared coefficient of variation."""
    return _weibull(round(_FINENESS * math.log2(variation)) if variation > _LEAST_VARIATION else _MOST_REGULAR)


_FINENESS = 8  # variations that differ by less than a factor of 2 ** (1 / 8) are one
_LEAST_VARIATION = 1 / 64  # what is more regular is taken to be as regular as this
_SHAPES = 0.1, 20.0  # between these lie those of all variations that can occur
_SHAPE_ERROR = 1e-6
_MOST_REGULAR = round(_FINENESS * math.log2(_LEAST_VARIATION))


@cache
def _weibull(place: int) -> tuple[float, float]:
    wanted = 2.0 ** (place / _FINENESS)
    low, high = _SHAPES
    while high - low > _SHAPE_ERROR:
        shape = (low + high) / 2.0
        variation = math.gamma(1.0 + 2.0 / shape) / math.gamma(1.0 + 1.0 / shape) ** 2 - 1.0
        low, high = (shape, high) if variation > wanted else (low, shape)
    return low, 1.0 / math.gamma(1.0 + 1.0 / low)


class Steps:
    """Seconds of a model's steps: those that take in new requests (a prefill, a whole batch), and those that go on.

    service: of all the steps that a request is in until it is answered.
    """

    __slots__ = ("going_on", "opening", "service")

    def __init__(self, weight: float) -> None:
        self.opening = Mean(weight)
        self.going_on = Mean(weight)
        self.service = Mean(weight)

    def answered(self, seconds: float) -> None:
        self.service.add(seconds)

    def add(self, seconds: float, opening: bool) -> None:
        (self.opening if opening else self.going_on).add(seconds)

    def expected(self, opening: bool) -> float | None:
        """Seconds of the next step; None before any was seen."""
        first, second = (self.opening, self.going_on) if opening else (self.going_on, self.opening)
        return first.value if first.value is not None else second.value


class Link:
    """bandwidth: bytes a second from the host to the device.

    What came over what it took, both as running means: a transfer of one short page, whose time says nothing, then
    counts for as little as it moved.
    """

    __slots__ = ("_frames", "_seconds", "bandwidth", "frame_bytes", "frame_seconds")

    def __init__(self, hint: float, frame_bytes: int, weight: float) -> None:
        self._frames = Mean(weight)
        self._seconds = Mean(weight)
        self.bandwidth = hint
        self.frame_bytes = frame_bytes
        self.frame_seconds = frame_bytes / hint

    def add(self, frames: int, seconds: float) -> None:
        """A transfer that had the link to itself took so long."""
        if not frames or seconds <= 0.0:
            return
        if self._seconds.value is None:  # the hint is worth as much as a transfer of this size
            self._frames.add(frames)
            self._seconds.add(self.seconds(frames))
        self._frames.add(frames)
        self._seconds.add(seconds)
        assert self._frames.value is not None
        assert self._seconds.value is not None
        self.frame_seconds = self._seconds.value / self._frames.value
        self.bandwidth = self.frame_bytes / self.frame_seconds

    def seconds(self, frames: int) -> float:
        return frames * self.frame_seconds
