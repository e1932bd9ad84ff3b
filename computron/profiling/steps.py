"""Times the steps of one model by calls of different shapes, and what a call costs beside its steps."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from computron.profiling import questions
from computron.profiling.fit import Fitted, Timed, fit
from computron.profiling.questions import Question
from computron.profiling.server import CannotProfile, Details, Server
from computron.profiling.shapes import Shape, shapes_for

ROUNDS = 3  # at least so many calls of each shape are timed, after one that is not
FEWEST = 2  # of calls that took equally many steps, for a median
STEP_TOKENS = 2048  # of prompts in one call; more may be read in several steps
FOREIGN = 0.05  # share of calls between which others' requests to the model may come
DISTURBED = 0.3  # share of calls that may be discarded, those and others that joined steps in another way
GENERATES = ("base", "per_prompt_token", "per_sequence", "per_context_token", "opening")
READS = ("base", "per_prompt_token", "per_sequence")
LOOKS = ("base", "per_sequence")


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """`call_overhead`: seconds of a call beside its steps. `step_overhead`: between two steps; None: it has but one.

    `discarded`: of the calls that were `made`, those whose steps were not known to hold what they should, or which
    alone of their shape took so many steps.
    """

    calls: tuple[Timed, ...]
    fitted: Fitted
    call_overhead: float
    step_overhead: float | None
    made: int = 0
    discarded: int = 0


Asks = Callable[[Shape], Sequence[Question]]
"""The calls, to be made at once, that together are of this shape."""


async def measure_steps(
    server: Server, model: Details, seconds: float, pause: float, body: Any = None
) -> MeasuredSteps:
    """Call the model again and again for about so many seconds. `body`: of a request, for models that read no text.

    `pause`: seconds of rest before each call. At least ROUNDS calls of each shape are timed, however long they take.

    Raises CannotProfile, also if somebody else asks the model meanwhile.
    """
    kind, asks = await _how_to_ask(server, model, body)
    shapes = shapes_for(kind, model.max_batch_size, model.max_model_len, STEP_TOKENS)
    await server.load(model.id)
    for shape in shapes:
        await _ask(server, asks(shape))
    timings, made = await _time_shapes(server, model, shapes, asks, seconds, pause)
    calls = [
        Timed(shape.name, shape.work(steps), statistics.median(seconds for seconds, _ in samples), len(samples))
        for (shape, steps), samples in sorted(timings.items(), key=lambda timed: shapes.index(timed[0][0]))
        if len(samples) >= FEWEST
    ]
    terms = GENERATES if kind == "generate" else LOOKS if kind == "other" else READS
    call_overhead, step_overhead = _overheads(timings)
    kept = sum(call.repeats for call in calls)
    return MeasuredSteps(tuple(calls), fit(calls, terms), call_overhead, step_overhead, made, made - kept)


async def _how_to_ask(server: Server, model: Details, body: Any) -> tuple[str, Asks]:
    """The kind of shapes that the model takes, and the calls of one."""
    if model.task == "custom":
        if body is None:
            raise CannotProfile(f"{model.id} is a custom model: say what to send it, with --body {model.id}=FILE.json")
        request = questions.custom(model.id, body)
        return "other", lambda shape: [request] * shape.batch
    if model.task == "classify" and not model.max_model_len:
        return "other", lambda shape: [questions.images(model.id, count=shape.batch)]

    def texts(shape: Shape) -> list[Question]:
        return [
            questions.texts(
                model.id,
                model.task,
                count=shape.batch,
                tokens=shape.prompt_tokens,
                output_tokens=shape.output_tokens,
            )
        ]

    return model.task, texts


async def _ask(server: Server, asked: Sequence[Question]) -> float:
    """Seconds until all are answered."""
    answers = await asyncio.gather(*(server.ask(question) for question in asked))
    return max(answer.last for answer in answers)


Timings = dict[tuple[Shape, int], list[tuple[float, float]]]
"""(shape, steps that it took) -> (seconds of the steps, of the whole call), call by call."""


async def _time_shapes(
    server: Server, model: Details, shapes: Sequence[Shape], asks: Asks, seconds: float, pause: float
) -> tuple[Timings, int]:
    """And how many calls were made."""
    timings: Timings = defaultdict(list)
    disturbed = foreign = rounds = 0
    last = await server.counts(model.id)
    order = random.Random(0)
    end = time.monotonic() + seconds
    while rounds < ROUNDS or time.monotonic() < end:
        rounds += 1
        for shape in order.sample(shapes, len(shapes)):  # what one call leaves behind shall not meet the same always
            await asyncio.sleep(pause)
            before = await server.counts(model.id)
            whole = await _ask(server, asks(shape))
            now = await server.counts(model.id)
            now.since(last).refuse_others(model.id)
            took, last = now.since(before), now
            expected = shape.batch * shape.output_tokens
            foreign += took.step_requests > expected
            if took.step_requests != expected or (shape.output_tokens > 1 and took.steps != shape.steps):
                disturbed += 1
                continue
            timings[shape, took.steps].append((took.step_seconds, whole))
    made = rounds * len(shapes)
    if foreign > made * FOREIGN:
        raise CannotProfile(f"other requests to {model.id} came between: measure a server that nobody else uses")
    if disturbed > made * DISTURBED:
        raise CannotProfile(
            f"{disturbed} of {made} calls of {model.id} took other steps than expected: measure a server and a machine "
            "that have nothing else to do"
        )
    return timings, made


def _overheads(timings: Timings) -> tuple[float, float | None]:
    """Medians over the calls of one request: what a call of one step takes beside it, and what each more adds."""
    beside = [
        (shape.output_tokens - 1, whole - steps)
        for (shape, _), samples in timings.items()
        for steps, whole in samples
        if shape.batch == 1
    ]
    call = statistics.median(seconds for more, seconds in beside if not more)
    between = [(seconds - call) / more for more, seconds in beside if more]
    return max(0.0, call), max(0.0, statistics.median(between)) if between else None
