"""Does the simulator foretell what a live server does?

Six workloads on an emulated link, twelve models of random weights with room for two of them and a part. A server is
measured as `computron bench profile` does it. Then another one, which remembers nothing, gets the workloads of its task
over HTTP, open-loop, one after the other, and the very same arrivals are simulated with what was measured. A row's
baseline is the live figure, its value the simulated one; `*_error` is the difference, relative to the live figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop
from _common import Report, arguments
from _replay import Replay, computron_serve, replay

from computron.profiling import questions
from computron.profiling.measuring import Measured, measure
from computron.profiling.server import Server
from computron.simulation.arrivals import Constant, LogNormal, Settings, generate, zipf
from computron.simulation.hardware import Profile
from computron.simulation.simulate import simulate
from computron.simulation.workload import Arrival, Workload

Floats = npt.NDArray[np.float64]

SIZE = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "vocab_size": 1024, "dtype": "float32"}
CONFIGS = {
    "embed": {
        **SIZE,
        "architectures": ["BertModel"],
        "model_type": "bert",
        "intermediate_size": 1536,
        "max_position_embeddings": 256,
    },
    "generate": {
        **SIZE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 1024,
        "max_position_embeddings": 256,
    },
}  # 56 and 58 MiB
SERVE = """
[server]
log_level = "warning"
[device]
kind = "host"
memory = "{memory}MiB"
link_bandwidth = "{bandwidth}MB/s"
[host]
memory = "4GiB"
"""
MODEL = """
[[models]]
id = "{name}"
source = "random:{source}"
task = "{task}"
seed = {seed}
max_batch_size = 8
"""
MODELS = 12
MEMORY = {"embed": 118, "generate": 128}  # MiB: room for two of twelve, and some pages
BANDWIDTH = 200  # MB/s: a swap takes ten steps and more
ZIPF = 1.0
RATE = 2.0  # requests a second, of all models: medians lie among swaps, not between hits and swaps
PAUSE = 2.0  # seconds between two workloads
REST = 0.5  # seconds between two calls of a profile, as between requests of the workloads
PERCENTILES = (50, 99)
# One core computes, the other has the event loop, the copies and the load.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    task: str
    popularity: str
    cv: float

    @property
    def name(self) -> str:
        return f"{self.task}_{self.popularity}_cv{self.cv:g}"

    def workload(self, duration: float, seed: int) -> Workload:
        models = names(self.task)
        rates = zipf(models, RATE, ZIPF if self.popularity == "skewed" else 0.0)
        output = LogNormal(4, 2, 1, 12) if self.task == "generate" else Constant()
        return generate(Settings(rates, duration, self.cv, seed, LogNormal(24, 12, 8, 64), output), self.name)


CASES = (
    Case("embed", "uniform", 0.25),
    Case("embed", "uniform", 1.0),
    Case("embed", "skewed", 4.0),
    Case("generate", "uniform", 0.25),
    Case("generate", "skewed", 1.0),
    Case("generate", "skewed", 4.0),
)
NAMES = tuple(f"fidelity.{case.name}.p{share}_error" for case in CASES for share in PERCENTILES)


@dataclass(frozen=True)
class Latencies:
    """Seconds of each request, in their order, until its first token and until its end."""

    first: Floats
    last: Floats


@dataclass(frozen=True)
class Compared:
    case: Case
    live: Latencies
    simulated: Latencies


def one_after_another(workloads: Sequence[Workload], duration: float) -> tuple[Workload, list[slice]]:
    """All of them, each beginning when the one before has had time to end; and which requests are whose."""
    arrivals: list[Arrival] = []
    places = []
    for number, workload in enumerate(workloads):
        start = number * (duration + PAUSE)
        places.append(slice(len(arrivals), len(arrivals) + len(workload.arrivals)))
        arrivals += (each._replace(time=start + each.time) for each in workload.arrivals)
    return Workload("all", workloads[0].models, tuple(arrivals)), places


async def profile(url: str) -> Measured:
    """The server's first model, which all others are like."""
    async with Server(url) as server:
        first = (await server.models())[0]
        return await measure(server, models=[first.id], seconds=0.0, pause=REST)  # three rounds


async def send(url: str, task: str, workload: Workload) -> Replay:
    """After one request to each model, in order, as the simulator begins."""
    async with Server(url) as server:
        for model in workload.models:
            await server.ask(question(task, Arrival(0.0, model)))
        return await replay(server, workload, {each: question(task, each) for each in workload.arrivals})


def for_all(profile: Profile, models: Sequence[str]) -> Profile:
    """The profile with its one model under each of these names."""
    return replace(profile, models=tuple(replace(profile.models[0], name=name) for name in models))


def question(task: str, arrival: Arrival) -> questions.Question:
    return questions.texts(
        arrival.model,
        task,
        count=1,
        tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        stream=task == "generate",
    )


def names(task: str) -> list[str]:
    return [f"{task}-{number}" for number in range(MODELS)]


def serve_config(task: str, folder: Path) -> str:
    source = folder / task / "config.json"
    source.parent.mkdir()
    source.write_text(json.dumps(CONFIGS[task]))
    models = [MODEL.format(name=name, source=source, task=task, seed=seed) for seed, name in enumerate(names(task))]
    return SERVE.format(memory=MEMORY[task], bandwidth=BANDWIDTH) + "".join(models)


def compare(
    task: str, folder: Path, runner: asyncio.Runner, report: Report, options: argparse.Namespace
) -> list[Compared]:
    """All cases of the task; the rows about the profile and about the sending are added here."""
    duration = 5.0 if options.quick else 60.0
    config = serve_config(task, folder)
    with computron_serve(config, ENVIRONMENT) as url:
        measured = runner.run(profile(url))
    described = for_all(measured.profile, names(task))
    cases = [case for case in CASES if case.task == task]
    workload, places = one_after_another([case.workload(duration, options.seed) for case in cases], duration)
    with computron_serve(config, ENVIRONMENT) as url:
        replayed = runner.run(send(url, task, workload))
    log = simulate(replayed.sent, described.hardware, described.models)
    arrived = np.array(log.arrived)
    live = np.array(replayed.first), np.array(replayed.last)
    simulated = np.array(log.first_token) - arrived, np.array(log.finished) - arrived
    (steps,) = measured.steps.values()
    report.row(f"profile.{task}.steps.typical_error", steps.fitted.typical_error, "share")
    report.row(f"profile.{task}.steps.worst_error", steps.fitted.worst_error, "share")
    report.row(f"profile.{task}.link", measured.link.link.bandwidth / 1e6, "MB/s", BANDWIDTH)
    late = max(sent.time - due.time for sent, due in zip(replayed.sent.arrivals, workload.arrivals, strict=True))
    report.row(f"fidelity.{task}.sent_late_ms", late * 1000, "ms")
    return [
        Compared(case, *(Latencies(*(each[place] for each in side)) for side in (live, simulated)))
        for case, place in zip(cases, places, strict=True)
    ]


def add_rows(report: Report, compared: Compared) -> None:
    case, live, simulated = compared.case, compared.live, compared.simulated
    add_percentiles(report, f"fidelity.{case.name}", live.last, simulated.last)
    if case.task == "generate":
        add_percentiles(report, f"fidelity.{case.name}.first_token", live.first, simulated.first)
    report.row(f"fidelity.{case.name}.requests", len(live.last), "requests")


def add_percentiles(report: Report, name: str, live: Floats, simulated: Floats) -> None:
    for share in PERCENTILES:
        real, foretold = (float(np.percentile(values, share)) for values in (live, simulated))
        report.row(f"{name}.p{share}", foretold * 1000, "ms", real * 1000, foretold / real)
        report.row(f"{name}.p{share}_error", abs(foretold / real - 1.0), "share")


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("Simulated latency against a live server, emulated link", options, NAMES)
    results: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for task in CONFIGS:
            compared = compare(task, Path(folder), runner, report, options)
            for each in compared:
                add_rows(report, each)
            results += compared
    report.plot(lambda axes: draw(axes, results))
    report.finish()


def draw(axes: Any, results: Sequence[Compared]) -> None:
    """The distributions of latencies: solid as measured, dashed as simulated."""
    for compared in results:
        colour = None
        for latencies, style in ((compared.live.last, "-"), (compared.simulated.last, "--")):
            shares = (np.arange(len(latencies)) + 1) / len(latencies)
            label = compared.case.name if style == "-" else None
            (line,) = axes.plot(np.sort(latencies) * 1000, shares, style, color=colour, label=label)
            colour = line.get_color()
    axes.set_xlabel("latency (ms); dashed: simulated")
    axes.set_ylabel("share of requests")
    axes.set_xscale("log")
    axes.legend()


if __name__ == "__main__":
    main()
