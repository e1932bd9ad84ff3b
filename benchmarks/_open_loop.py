"""Requests sent when they are due, whatever has been answered until then, and what became of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
from _questions import Question


@dataclass(frozen=True, slots=True)
class Ask:
    time: float  # seconds after the beginning
    model: str
    question: Question


@dataclass(frozen=True, slots=True)
class Outcome:
    """latency: seconds until the answer, or until it was given up. right: None if there was none."""

    ask: Ask
    latency: float
    right: bool | None


@dataclass(frozen=True, slots=True)
class Summary:
    """median, p99: seconds, with what was given up counted as long as it was waited for. requests, tokens: a second."""

    median: float
    p99: float
    answered: int
    wrong: int
    requests: float
    tokens: float


def asks(
    rates: Mapping[str, float], cv: float, seconds: float, seed: int, questions: Mapping[str, Sequence[Question]]
) -> list[Ask]:
    """Gamma arrivals of each model, in order of time; each model's questions in turn."""
    from computron.simulation.arrivals import Settings, generate

    turns = {model: itertools.cycle(asked) for model, asked in questions.items()}
    workload = generate(Settings(rates=rates, duration=seconds, cv=cv, seed=seed))
    return [Ask(arrival.time, arrival.model, next(turns[arrival.model])) for arrival in workload.arrivals]


def idle_timeout(asked: Sequence[Ask], room: int, seconds: float) -> int:
    """The most whole seconds, at least 1, after which models may leave so that on average at most `room` are there.

    A model is there from each of its requests on for so long; loading and answering are taken to need no time.
    """
    times: dict[str, list[float]] = {}
    for ask in asked:
        times.setdefault(ask.model, []).append(ask.time)

    def loaded(timeout: int) -> float:
        spans = (
            (min(timeout, later - now) for now, later in itertools.pairwise([*of, seconds])) for of in times.values()
        )
        return sum(map(sum, spans)) / seconds

    return max(itertools.takewhile(lambda timeout: loaded(timeout) <= room, range(1, int(seconds) + 1)), default=1)


async def replay(
    url: str, asked: Sequence[Ask], *, name_of: Callable[[str], str], limit: float
) -> tuple[list[Outcome], float]:
    """What became of each, and the seconds until the last was answered or given up. `limit`: seconds for each."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=limit)) as session:
        began = time.perf_counter()

        async def one(ask: Ask) -> Outcome:
            await asyncio.sleep(began + ask.time - time.perf_counter())
            sent = time.perf_counter()
            right = await answered(session, url, name_of(ask.model), ask.question)
            latency = time.perf_counter() - sent
            return Outcome(ask, latency if right is not None else max(latency, limit), right)

        outcomes = await asyncio.gather(*map(one, asked))
        return list(outcomes), time.perf_counter() - began


async def answered(session: aiohttp.ClientSession, url: str, model: str, question: Question) -> bool | None:
    """Whether the answer was right; None if there was none, for whatever reason."""
    headers = {"serve_multiplexed_model_id": model}  # where Ray looks; the others do not
    try:
        async with session.post(url + question.path, json=question.body(model), headers=headers) as response:
            return question.is_answered_by(await response.json()) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None


def summarize(outcomes: Sequence[Outcome], seconds: float) -> Summary:
    latencies = [outcome.latency for outcome in outcomes]
    answered = [outcome for outcome in outcomes if outcome.right is not None]
    return Summary(
        median=float(np.median(latencies)),
        p99=float(np.percentile(latencies, 99)),
        answered=len(answered),
        wrong=sum(outcome.right is False for outcome in answered),
        requests=len(answered) / seconds,
        tokens=sum(outcome.ask.question.tokens for outcome in answered) / seconds,
    )
