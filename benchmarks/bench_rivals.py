"""How long do answers take beside other ways of serving more models than the device holds?

Fine-tunes of real models with no page in common, room for half of them. Requests come as Gamma processes, few models
get most of them, and they are sent when they are due, over HTTP, to one system after the other: Computron first, then
each rival, all on the same cores with the same threads. Every answer is compared with that of transformers. Two
workloads: completions of SmolLM2-135M-Instruct in bfloat16, where computing takes longer than moving, and embeddings of
all-MiniLM-L6-v2 in float32, where moving takes longer. Rivals are described in benchmarks/rivals and installed by
benchmarks/rivals/install.py.

`rivals.{rival}.median_ratio` and `.p99_ratio` (`rivals.embed.{rival}...` for embeddings) are the rival's latency over
Computron's: above 1, Computron is faster. What is not answered in time counts as --limit seconds, so that the ratios
are then too small. `loads` are models that came (for Computron also parts of them), `memory` is the peak of PSS of all
processes, host copies of the models included. Nothing is emulated; `--device` changes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
from _common import Report, arguments
from _open_loop import Ask, Summary, answered, asks, idle_timeout, replay, summarize
from _questions import Question, completions, embeddings

if TYPE_CHECKING:
    from _rival_systems import Setup, System

MODELS, ROOM = 8, 4
ZIPF = 1.0
CV = 4.0
MAX_BATCH = 16
TOKENS = (4,)  # of answers, in turn
TOKENS_A_SEQUENCE = 32  # question and answer
FIGURES = ("median_ratio", "p99_ratio")


@dataclass(frozen=True, slots=True)
class Workload:
    """rate: requests a second of all models together. seconds, quick_seconds: for which they come.

    rivals: that can serve it; `quick_rivals` of them are measured with --quick.
    """

    prefix: str
    task: str
    dtype: str
    rate: float
    seconds: float
    quick_seconds: float
    rivals: tuple[str, ...]
    quick_rivals: tuple[str, ...]


WORKLOADS = {
    "generate": Workload(
        prefix="rivals",
        task="generate",
        dtype="bfloat16",
        rate=3.0,
        seconds=45.0,
        quick_seconds=10.0,
        rivals=("ray_serve", "torch_to", "switcher", "transformers_serve", "vllm_cpu"),
        quick_rivals=("ray_serve",),
    ),
    "embed": Workload(
        prefix="rivals.embed",
        task="embed",
        dtype="float32",
        rate=20.0,
        seconds=20.0,
        quick_seconds=5.0,
        rivals=("ray_serve", "torch_to", "switcher"),
        quick_rivals=("ray_serve",),
    ),
}
RIVALS = WORKLOADS["generate"].rivals
NAMES = tuple(
    f"{workload.prefix}.{rival}.{figure}"
    for workload in WORKLOADS.values()
    for rival in workload.rivals
    for figure in FIGURES
)


@dataclass(frozen=True, slots=True)
class Measured:
    summary: Summary
    asked: int
    loads: float
    gigabytes: float
    memory: int
    cpu: float


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rivals", metavar="A,B", help=f"of {', '.join(RIVALS)}; default: all, quick: ray_serve")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), help="default: both")
    parser.add_argument("--rate", type=float, help="requests a second; default: 3 of completions, 20 of embeddings")
    parser.add_argument("--seconds", type=float, help="of requests; default: 45 and 20, quick: 10 and 5")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds until a request is given up; default: 45")


def main() -> None:
    options = arguments(__doc__ or "", extend)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not without stopping what was started
    import torch

    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    workloads = [WORKLOADS[options.workload]] if options.workload else list(WORKLOADS.values())
    names: list[str] = []
    results: dict[str, dict[str, Measured]] = {}
    reasons: list[str] = []
    for workload in workloads:
        measured = results[workload.prefix] = {}
        for name, result in compare(workload, options, threads):
            if isinstance(result, Measured):
                measured[name] = result
            else:
                reasons.append(f"{workload.prefix}.{name}: {result}")
        names += [
            f"{workload.prefix}.{name}.{figure}" for name in measured if name != "computron" for figure in FIGURES
        ]
    report = Report(f"Rivals: {MODELS} models, room for {ROOM}", options, names)
    for prefix, measured in results.items():
        rows(report, prefix, measured)
    report.finish()
    print("\n".join(reasons))


def compare(workload: Workload, options: argparse.Namespace, threads: int) -> list[tuple[str, Measured | str]]:
    """Computron, then the chosen rivals: what was measured, or why nothing was."""
    from _rival_systems import computron, installation, rival

    chosen = chosen_rivals(workload, options.rivals, quick=options.quick)
    seconds = options.seconds or (workload.quick_seconds if options.quick else workload.seconds)
    setup, asked = prepare(workload, options.rate or workload.rate, seconds, options.seed, threads)
    print(f"{workload.prefix}: {len(asked)} requests in {seconds:g} s", flush=True)
    results: list[tuple[str, Measured | str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results.append(("computron", measure(computron(setup, folder), asked, options.limit, folder / "computron.log")))
        for name in chosen:
            reason = installation.reason_of(name)
            if reason is not None:
                results.append((name, reason))
                continue
            try:
                results.append((name, measure(rival(name, setup), asked, options.limit, folder / f"{name}.log")))
            except RuntimeError as error:
                results.append((name, f"does not run here: {error}"))
    return results


def chosen_rivals(workload: Workload, given: str | None, *, quick: bool) -> list[str]:
    """Of this workload's. Raises SystemExit if one is of none."""
    if given is None:
        return list(workload.quick_rivals if quick else workload.rivals)
    names = given.split(",")
    if unknown := sorted(set(names) - set(RIVALS)):
        raise SystemExit(f"{', '.join(unknown)}: not one of {', '.join(RIVALS)}")
    return [name for name in names if name in workload.rivals]


def prepare(workload: Workload, rate: float, seconds: float, seed: int, threads: int) -> tuple[Setup, list[Ask]]:
    from _fine_tunes import fine_tunes
    from _rival_systems import Setup

    from computron.models.demo import demo_models
    from computron.simulation.arrivals import zipf

    demo = demo_models()
    models = fine_tunes(demo.smollm2 if workload.task == "generate" else demo.minilm, MODELS)
    questions: Mapping[str, Sequence[Question]]
    questions = completions(models, TOKENS) if workload.task == "generate" else embeddings(models)
    asked = asks(zipf(list(models), rate, ZIPF), CV, seconds, seed, questions)
    cache = cache_bytes(next(iter(models.values()))) if workload.task == "generate" else 0
    setup = Setup(
        task=workload.task,
        models=models,
        room=ROOM,
        cache=ROOM * MAX_BATCH * TOKENS_A_SEQUENCE * cache,
        dtype=workload.dtype,
        threads=threads,
        max_batch_size=MAX_BATCH,
        idle_timeout=idle_timeout(asked, ROOM, seconds),
    )
    return setup, asked


def measure(system: System, asked: Sequence[Ask], limit: float, log: Path) -> Measured:
    """Start, warm up, ask, stop. Raises RuntimeError if the system does not start or does not answer at all."""
    from _rival_systems import running

    with running(system, log) as started:
        asyncio.run(_warm_up(started.url, asked, started.name_of))
        before, cpu = started.loads(), started.cpu_seconds()
        outcomes, seconds = asyncio.run(replay(started.url, asked, name_of=started.name_of, limit=limit))
        loads, cpu = started.loads() - before, started.cpu_seconds() - cpu
        summary = summarize(outcomes, seconds)
    print(f"{log.stem}: median {summary.median:.3f} s, p99 {summary.p99:.3f} s, {loads.models:g} loads", flush=True)
    return Measured(summary, len(asked), loads.models, loads.nbytes / 1e9, started.peak, cpu)


def warm_up_order(asked: Sequence[Ask], room: int) -> list[Ask]:
    """One request for each of the `room` models that are asked most, the most asked last."""
    counts: dict[str, int] = {}
    for ask in asked:
        counts[ask.model] = counts.get(ask.model, 0) + 1
    first = {ask.model: ask for ask in reversed(asked)}
    return [first[model] for model in sorted(counts, key=lambda model: counts[model])[-room:]]


async def _warm_up(url: str, asked: Sequence[Ask], name_of: Callable[[str], str]) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for ask in warm_up_order(asked, ROOM):
            if await answered(session, url, name_of(ask.model), ask.question) is None:
                raise RuntimeError(f"{ask.model} was not answered in the warm-up")


def cache_bytes(folder: Path) -> int:
    """Of one token's keys and values, in a dtype of two bytes."""
    config = json.loads((folder / "config.json").read_text())
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2)


def rows(report: Report, prefix: str, results: Mapping[str, Measured]) -> None:
    ours = results["computron"].summary
    for name, result in results.items():
        here, summary = f"{prefix}.{name}", result.summary
        if name != "computron":
            report.row(f"{here}.median_ratio", summary.median, "s", ours.median, summary.median / ours.median)
            report.row(f"{here}.p99_ratio", summary.p99, "s", ours.p99, summary.p99 / ours.p99)
        report.row(f"{here}.median", summary.median, "s")
        report.row(f"{here}.p99", summary.p99, "s")
        report.row(f"{here}.answered", summary.answered, "requests", result.asked, summary.answered / result.asked)
        report.row(f"{here}.wrong", summary.wrong, "requests")
        report.row(f"{here}.loads", result.loads, "models")
        report.row(f"{here}.moved", result.gigabytes, "GB")
        report.row(f"{here}.requests", summary.requests, "requests/s")
        report.row(f"{here}.tokens", summary.tokens, "tokens/s")
        report.row(f"{here}.cpu", result.cpu / max(1, summary.answered), "CPU s/request")
        report.row(f"{here}.memory", result.memory / (1 << 30), "GiB")


if __name__ == "__main__":
    main()
