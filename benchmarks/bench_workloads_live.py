"""Do the simulated workloads of `bench_workloads` come out alike on live servers?

Three models of random weights with device memory for two, on an EMULATED LINK whose bandwidth gives a swap as many
times as long as a step as in Computron's paper (OPT-13B on four A100s). Everything is as many times as fast as this
machine's step is shorter than that of the paper, arrivals too. Each server runs in a process of its own and gets the
same requests over HTTP from OpenAI's client, open-loop: when they are due, whatever has been answered. Cell by cell the
servers are measured one after the other.

`live.{cell}.over_lru`: mean latency of the default policy; baseline: of `lru` without prefetching.
`live.{cell}.over_all_resident`: baseline is the same server with device memory for all three. `p99_*`: the same of the
99th percentiles.
`live.step_seconds`, `live.swap_seconds`: what the paper's 0.0424 s and 0.26 s are here. `live.workload_seconds`: how
much of the paper's 30 s there was time for.
The link and the device are emulated on the host, whatever `--device` says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openai
import uvloop
from _common import Report, arguments
from _replay import computron_serve

from computron.simulation.presets import COMPUTE_SECONDS, DURATION, EXPERIMENT_2, LINK_BANDWIDTH, MODEL_BYTES, Cell
from computron.simulation.workload import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELLS = ("3x2.1-1-1.cv0.25", "3x2.10-1-1.cv0.25", "3x2.10-1-1.cv1", "3x2.10-1-1.cv4")
COMPARED = ("over_lru", "over_all_resident", "p99_over_lru", "p99_over_all_resident")
SCALES = ("live.step_seconds", "live.swap_seconds", "live.workload_seconds")
NAMES = (*SCALES, *(f"live.{cell}.{row}" for cell in CELLS for row in COMPARED))
SWAP_IN_STEPS = MODEL_BYTES / 4 / LINK_BANDWIDTH / COMPUTE_SECONDS
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "vocab_size": 1024,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
MODELS = ("opt0", "opt1", "opt2")
PROMPT = [1, 2]  # so short that a batch takes hardly longer than one request, as on the paper's devices
MIB = 1 << 20
CACHES = 8 * MIB  # device memory for the KV caches of all, beside whole models
CONFIG = """
[server]
log_level = "warning"
[device]
kind = "host"
memory = "{memory}B"
link_bandwidth = "{bandwidth}B/s"
[host]
memory = "2GiB"
[scheduler]
policy = "{policy}"
prefetch = {prefetch}
"""
TABLE = """
[[models]]
id = "{name}"
source = "random:{source}"
seed = {seed}
max_batch_size = 8
"""
# One core computes, the other has the event loop, the copies and the load.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
CALIBRATION = 40  # requests
BUDGET, QUICK_BUDGET = 180.0, 40.0  # seconds for all workloads; where a step takes long they are cut short
SHORTEST = 5.0  # of the paper's seconds; with less there might be no request at all
TIMEOUT = 60.0


@dataclass(frozen=True)
class Measured:
    mean: float
    p99: float


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("Workloads of experiment 2, live on an emulated link", options, NAMES)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(compare(Path(folder), options, report))
    report.plot(lambda axes: _draw(axes, results))
    report.finish()


async def compare(folder: Path, options: argparse.Namespace, report: Report) -> dict[str, dict[str, Measured]]:
    source = folder / "config.json"
    source.write_text(json.dumps(MODEL))
    with contextlib.ExitStack() as stack:
        everything = stack.enter_context(computron_serve(config(source, 3), ENVIRONMENT))
        step, size = await calibrate(everything)
        scale, swap = step / COMPUTE_SECONDS, SWAP_IN_STEPS * step
        bandwidth = round(size / swap)
        servers = {
            "all_resident": everything,
            **{
                policy: stack.enter_context(computron_serve(config(source, 2, size, bandwidth, policy), ENVIRONMENT))
                for policy in ("default", "lru")
            },
        }
        budget = QUICK_BUDGET if options.quick else BUDGET
        seconds = max(SHORTEST, min(DURATION, budget / len(CELLS) / len(servers) / scale))
        report.row("live.step_seconds", step, "s", COMPUTE_SECONDS, scale)
        report.row("live.swap_seconds", swap, "s", SWAP_IN_STEPS * COMPUTE_SECONDS, scale)
        report.row("live.workload_seconds", seconds, "s", DURATION, seconds / DURATION)
        results = {}
        for cell in (cell for cell in EXPERIMENT_2 if cell.name in CELLS):
            workload = faster(cell, scale, seconds, options.seed)
            found = {name: await measure(url, workload) for name, url in servers.items()}
            results[cell.name] = found
            _add_rows(report, cell.name, found)
        return results


def config(source: Path, room: int, size: int = 256 * MIB, bandwidth: int = 10**10, policy: str = "default") -> str:
    """room: for how many models of this size there is device memory."""
    text = CONFIG.format(
        memory=(room * size + CACHES) // MIB * MIB,
        bandwidth=bandwidth,
        policy=policy,
        prefetch="false" if policy == "lru" else "true",
    )
    return text + "".join(TABLE.format(name=name, source=source, seed=seed) for seed, name in enumerate(MODELS))


async def calibrate(url: str) -> tuple[float, int]:
    """Median seconds of a request that finds its model there and idle; bytes of a model, in whole pages."""
    async with client(url) as asked:
        for model in MODELS:
            await ask(asked, model)
        seconds = [await ask(asked, MODELS[place % len(MODELS)]) for place in range(CALIBRATION)]
        told = await asked.models.retrieve(MODELS[0])
    return statistics.median(seconds), -(-int(getattr(told, "bytes")) // MIB) * MIB  # noqa: B009


def faster(cell: Cell, scale: float, seconds: float, seed: int) -> Workload:
    """The first seconds of the cell's workload, with all times in proportion to `scale`."""
    drawn = cell.workload(seed)
    arrivals = tuple(
        arrival._replace(time=arrival.time * scale) for arrival in drawn.arrivals if arrival.time < seconds
    )
    return Workload(drawn.name, drawn.models, arrivals, drawn.settings)


async def measure(url: str, workload: Workload) -> Measured:
    """After one request to each model, in order, as simulations begin."""
    async with client(url) as asked:
        for model in MODELS:
            await ask(asked, model)
        began = time.perf_counter()

        async def one(at: float, model: str) -> float:
            await asyncio.sleep(began + at - time.perf_counter())
            return await ask(asked, model)

        latencies = await asyncio.gather(*(one(arrival.time, arrival.model) for arrival in workload.arrivals))
    return Measured(statistics.fmean(latencies), float(np.percentile(latencies, 99)))


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=TIMEOUT)


async def ask(asked: openai.AsyncOpenAI, model: str) -> float:
    """Seconds until the answer of one token."""
    began = time.perf_counter()
    await asked.completions.create(model=model, prompt=PROMPT, max_tokens=1, temperature=0)
    return time.perf_counter() - began


def _add_rows(report: Report, name: str, found: dict[str, Measured]) -> None:
    ours = found["default"]
    for other in ("lru", "all_resident"):
        theirs = found[other]
        report.row(f"live.{name}.over_{other}", ours.mean, "s", theirs.mean, ours.mean / theirs.mean)
        report.row(f"live.{name}.p99_over_{other}", ours.p99, "s", theirs.p99, ours.p99 / theirs.p99)


def _draw(axes: Axes, results: dict[str, dict[str, Measured]]) -> None:
    places = np.arange(len(results))
    systems: Sequence[str] = ("default", "lru", "all_resident")
    for number, system in enumerate(systems):
        means = [found[system].mean for found in results.values()]
        axes.bar(places + (number - 1) * 0.25, means, 0.25, label=system)
    axes.set_xticks(places, list(results))
    axes.set_ylabel("mean latency in s, emulated link")
    axes.legend()


if __name__ == "__main__":
    main()
