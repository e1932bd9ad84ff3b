"""The hardware, models and experiments of Computron's paper (arXiv 2306.13835), in numbers.

Four A100 of 40 GB behind PCIe 4.0, OPT-13B in fp16, tensor parallel 2 x pipeline parallel 2. Every constant comes from
the source (github.com/dlzou/computron) or from experiment 1, two models that displace each other on blocking requests:

- One way, pinned memory, PCIe 4.0 gives an A100 25 GB/s. A quarter of a model, 6.5 GB, takes 0.260 s alone.
- An offload starts 0.1 s before the load that it makes room for, because the sender finds the first worker's inbox full
  and sleeps (systems/computron2023.py). Workers and engine poll every 10 ms, 15 ms together. So the published offload
  of 0.318 s was 0.1 s alone and 0.203 s beside the load for the remaining 0.16 s worth of copying: each direction kept
  0.79 of its bandwidth. The load, 0.423 s with 0.1 s of sleep, says 0.77. `DUPLEX` lies between. With one GPU it
  predicts an offload of 1.32 s (published: 1.238) and a load of 1.42 s (1.350).
- A batch of 0.0574 s, as the engine sees it, is compute and three polls of 5 ms on average: of two workers, and of the
  engine. The published engine overhead, 17 to 23 ms a request, is no constant here: it is two turns of its loop.

Not from the paper: `ORDER_SECONDS` is what groups of two and of four nodes took on a machine of 2 cores from the last
page of a piece to the first of the next one (0.5 to 1.1 ms, from the times and `seconds` of `swap_in_piece` in their
logs). Every transfer of every system takes it, also those of the published one, whose loads of 260 ms and more it
makes 0.3 % longer. `HTTP_SECONDS` is what `bench_overhead` measured.

`EXPERIMENT_1` and `EXPERIMENT_2` are its runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from computron.simulation.arrivals import Settings, generate
from computron.simulation.hardware import Hardware, Link, SimulatedModel, StepTime
from computron.simulation.log import Log
from computron.simulation.simulate import simulate
from computron.simulation.systems.computron2023 import COMPUTRON_2023
from computron.simulation.systems.system import System
from computron.simulation.workload import Arrival, Workload

FRAME_BYTES = 64 << 20
LINK_BANDWIDTH = 25e9  # bytes a second, one way, a GPU
DUPLEX = 0.78
MODEL_BYTES = 26_000_000_000  # OPT-13B, fp16
POLL_SECONDS = 0.005  # half of what lies between two looks of a worker or the engine
COMPUTE_SECONDS = 0.0574 - 3 * POLL_SECONDS  # of a batch, both stages of 2x2
ORDER_SECONDS = 0.0008  # in which the link stands still while a group orders the next transfer
HTTP_SECONDS = 0.001  # each way, of systems whose clients are not in the scheduler's process (bench_overhead)
DURATION = 30.0  # seconds, experiments/sim.py


def opt_13b(name: str, max_batch_size: int, nodes: int = 4, seconds: float = COMPUTE_SECONDS) -> SimulatedModel:
    """One node's share. All of a batch takes one step: short prompts, one token of output."""
    return SimulatedModel(name, MODEL_BYTES // nodes, StepTime(seconds), max_batch_size)


def a100s(resident: int, nodes: int = 4, stages: int = 2) -> Hardware:
    """Memory for so many whole models, and not a byte more."""
    frames = resident * opt_13b("", 1, nodes).pages(FRAME_BYTES)
    return Hardware(
        Link(LINK_BANDWIDTH, ORDER_SECONDS, DUPLEX),
        FRAME_BYTES,
        frames,
        stages,
        request_overhead=HTTP_SECONDS,
        answer_overhead=HTTP_SECONDS,
    )


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """One of the runs of experiment 1: two models in turn, room for one, each request once the one before is answered.

    batch: published seconds of a batch, as the engine saw it. published: mean seconds of a response.
    """

    tensor_parallel: int
    pipeline_parallel: int
    batch: float
    published: float

    @property
    def name(self) -> str:
        return f"{self.tensor_parallel}x{self.pipeline_parallel}"

    def responses(self) -> list[float]:
        """Of 24 requests; the first four, as published, do not count."""
        nodes, stages = self.tensor_parallel * self.pipeline_parallel, self.pipeline_parallel
        compute = self.batch - (stages + 1) * POLL_SECONDS
        models = tuple(opt_13b(f"opt{place}", 4, nodes, compute) for place in range(2))
        arrivals: list[Arrival] = []
        now, responses = 0.0, []
        for turn in range(24):
            arrivals.append(Arrival(now, models[turn % 2].name))
            workload = Workload(self.name, tuple(model.name for model in models), tuple(arrivals))
            log = simulate(workload, a100s(1, nodes, stages), models, system="computron2023", warm=False)
            responses.append(log.finished[turn] - now)
            now = log.finished[turn]
        return responses[4:]


EXPERIMENT_1 = (
    RoundRobin(1, 1, 0.0400, 1.408),
    RoundRobin(2, 1, 0.0475, 0.801),
    RoundRobin(4, 1, 0.0495, 0.761),
    RoundRobin(1, 2, 0.0486, 0.924),
    RoundRobin(1, 4, 0.0607, 0.722),
    RoundRobin(2, 2, 0.0574, 0.502),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One of the workloads of experiment 2. rates: of each model. published: its mean latency, of one unseeded run."""

    resident: int
    max_batch_size: int
    rates: tuple[int, ...]
    cv: float
    published: float

    @property
    def name(self) -> str:
        return f"{len(self.rates)}x{self.resident}.{'-'.join(map(str, self.rates))}.cv{self.cv:g}"

    @property
    def hardware(self) -> Hardware:
        return a100s(self.resident)

    @property
    def models(self) -> tuple[SimulatedModel, ...]:
        return tuple(opt_13b(f"opt{place}", self.max_batch_size) for place in range(len(self.rates)))

    def workload(self, seed: int) -> Workload:
        """Gamma arrivals of 30 s, as the paper tells it."""
        rates = {model.name: float(rate) for model, rate in zip(self.models, self.rates, strict=True)}
        return generate(Settings(rates, DURATION, self.cv, seed), self.name)

    def reproduction(self, seed: int, system: System = COMPUTRON_2023) -> list[float]:
        """Latencies that the published client would have measured: of what it sent, from when its loop sent it."""
        first = tuple(Arrival(0.0, model.name) for model in self.models)
        names = tuple(model.name for model in self.models)
        starts = self._cold(Workload(self.name, names, first), system).finished
        arrivals = first + sent(self.workload(seed), dict(zip(names, starts, strict=True)))
        log = self._cold(Workload(self.name, names, arrivals), system)
        latencies = [end - begin for begin, end in zip(log.noticed, log.finished, strict=True)]
        return latencies[len(first) :]

    def _cold(self, workload: Workload, system: System) -> Log:
        return simulate(workload, self.hardware, self.models, system=system, warm=False)


def sent(drawn: Workload, starts: Mapping[str, float]) -> tuple[Arrival, ...]:
    """When the client of experiments/sim.py sent what was drawn. starts: when each model's first request was answered.

    It subtracts from each interval what has passed since before it slept for the last request, so the whole last
    interval with it: requests come in pairs, twice as many a second, for half as long where intervals are regular.
    Each model's client begins when its first request, sent at 0, is answered.
    """
    arrivals: list[Arrival] = []
    for model in drawn.models:
        before = slept = 0.0
        now = starts[model]
        for arrival in drawn.arrivals:
            if arrival.model == model:
                slept = max(0.0, arrival.time - before - slept)
                before = arrival.time
                now += slept
                arrivals.append(arrival._replace(time=now))
    return tuple(sorted(arrivals, key=lambda arrival: arrival.time))


def _cells(resident: int, batch: int, published: dict[tuple[int, ...], tuple[float, float, float]]) -> tuple[Cell, ...]:
    return tuple(
        Cell(resident, batch, rates, cv, mean)
        for rates, means in published.items()
        for cv, mean in zip((0.25, 1.0, 4.0), means, strict=True)
    )


EXPERIMENT_2 = (
    *_cells(
        2, 8, {(1, 1, 1): (1.262, 0.606, 0.518), (10, 1, 1): (1.172, 0.886, 0.550), (10, 10, 1): (1.014, 0.716, 0.374)}
    ),
    *_cells(
        4,
        32,
        {
            (1, 1, 1, 1, 1, 1): (1.847, 1.282, 0.174),
            (10, 10, 1, 1, 1, 1): (2.017, 1.413, 0.229),
            (10, 10, 10, 10, 1, 1): (1.535, 1.470, 0.312),
        },
    ),
)
