"""How near is the first token after a swap to a perfect pipeline of transfer and compute?

A model that has been evicted is asked for one token. Its layers' times are measured in the same run while it is
resident, the link is emulated so that transfer and compute stand at 3:1, 1:1 and 1:3 (on CUDA: the real link, one row),
and the bound is what a pipeline without any overhead would need: stage k starts when its own bytes are there and stage
k-1 is done. Baseline: that bound. `over_unpipelined` compares with all of the transfer, then all of the compute.

On CUDA the device is synchronised between stages while they are timed, so that a stage's time is that of its kernels
and not of their launches.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from typing import TYPE_CHECKING

import torch
from _common import Report, arguments, uses_cuda

from computron import _transfer
from computron.config import Config, DeviceConfig, HostConfig, ModelConfig
from computron.execution.requests import GenerateJob, SamplingParams
from computron.memory.swapper import Gate
from computron.node.node import Node
from computron.node.worker import Worker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("first_token.over_pipeline_bound",)
MODEL = "measured"
RATIOS = {"3:1": 3.0, "1:1": 1.0, "1:3": 1 / 3}  # transfer : compute


class Timed:
    """Wraps the worker's gate and notes when each segment was first asked for, on a clock that stands in waits."""

    is_open = False  # so that the hooks are installed and tell the stages' times

    def __init__(self, gate: Gate, *, cuda: bool) -> None:
        self.asked: dict[int, float] = {}
        self._gate = gate
        self._cuda = cuda
        self._waited = 0.0

    def now(self) -> float:
        """Seconds, when all that was launched before has been computed."""
        return self._finished() - self._waited

    def wait(self, segment: int, stream: int = 0) -> None:
        before = self._finished()
        self.asked.setdefault(segment, before - self._waited)
        self._gate.wait(segment, stream)
        self._waited += self._finished() - before

    def _finished(self) -> float:
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        return time.perf_counter()


def perfect_pipeline(segment_bytes: list[int], bandwidth: float, stage_seconds: list[float]) -> float:
    """Seconds until the last stage ends, if stage k waits only for its own bytes and for stage k-1."""
    arrived = done = 0.0
    for nbytes, seconds in zip(segment_bytes, stage_seconds, strict=True):
        arrived += nbytes / bandwidth
        done = max(done, arrived) + seconds
    return done


class Bench:
    def __init__(self, model: ModelConfig, prompt: int, device: DeviceConfig) -> None:
        self.config = Config(device=device, host=HostConfig(memory=4 << 30), models=(model,))
        self.prompt = prompt

    async def start(self) -> None:
        self.node = Node(self.config)
        await self.node.startup()
        served = self.node.models[MODEL]
        ends = [0, *served.plan.image.segment_ends]
        self.segment_bytes = [b - a for a, b in itertools.pairwise(ends)]

    @property
    def worker(self) -> Worker:
        assert self.node._crew is not None
        return self.node._crew.worker

    async def ask(self) -> float:
        """Seconds from submission to the first token."""
        job = GenerateJob(
            tuple(1 + i % 1000 for i in range(self.prompt)),
            SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        )
        handle = self.node.submit(MODEL, job, request_id="bench")
        async for _ in handle:
            pass
        seconds = handle.timings.first_output_seconds
        assert seconds is not None
        return seconds

    async def evict(self) -> None:
        self.node.unload(MODEL)
        while self.node.snapshot().models[0].state != "absent":
            await asyncio.sleep(0.01)

    async def stage_seconds(self, repeats: int) -> list[float]:
        """Median time of each stage while the model is resident; the last one includes the step's end."""
        runner = self.worker.models[MODEL].runner
        run = runner.run
        runs: list[list[float]] = []

        def timed_run(step: object, gate: Gate) -> object:
            timed = Timed(gate, cuda=self.config.device.kind == "cuda")
            began = timed.now()
            result = run(step, timed)  # type: ignore[arg-type]
            ended = timed.now()
            starts = [began, *(timed.asked[k] for k in range(1, len(self.segment_bytes))), ended]
            runs.append([b - a for a, b in itertools.pairwise(starts)])
            return result

        runner.run = timed_run  # type: ignore[method-assign, assignment]
        try:
            for _ in range(repeats + 1):
                await self.ask()
        finally:
            runner.run = run  # type: ignore[method-assign]
        return [statistics.median(stage) for stage in zip(*runs[1:], strict=True)]

    async def stop(self) -> None:
        await self.node.shutdown(drain=1.0)


async def measure(report: Report, quick: bool, cuda: bool, seed: int) -> None:
    repeats = 3 if quick else 9
    preset = "llama-3.2-1b" if cuda else "smollm2-135m"
    prompt = 2048 if cuda else 1024
    model = ModelConfig(id=MODEL, source=f"random:{preset}", dtype="bfloat16", max_batch_tokens=4096, seed=seed)
    memory = (8 << 30) if cuda else (768 << 20)

    first = Bench(model, prompt, DeviceConfig(kind="cuda" if cuda else "host", memory=memory))
    await first.start()
    await first.ask()
    compute = sum(await first.stage_seconds(repeats))
    await first.stop()

    worst = 0.0
    drawn: dict[str, tuple[float, float, float]] = {}
    total = sum(first.segment_bytes)
    for name, ratio in ({"link": None} if cuda else RATIOS).items():
        bandwidth = None if ratio is None else total / (compute * ratio)
        bench = Bench(
            model, prompt, DeviceConfig(kind="cuda" if cuda else "host", memory=memory, link_bandwidth=bandwidth)
        )
        await bench.start()
        await bench.ask()
        shares: list[float] = []
        times: list[tuple[float, float, float]] = []
        for _ in range(repeats):
            stages = await bench.stage_seconds(3)  # beside each swap, for the machine's speed changes
            await bench.evict()
            seconds = await bench.ask()
            link = bandwidth if bandwidth is not None else link_speed(bench.worker.backend)
            bound = perfect_pipeline(bench.segment_bytes, link, stages)
            shares.append(seconds / bound)
            times.append((seconds, bound, sum(stages) + total / link))
        await bench.stop()
        over = statistics.median(shares)
        worst = max(worst, over)
        seconds, bound, unpipelined = (statistics.median(column) for column in zip(*times, strict=True))
        drawn[name] = (seconds, bound, unpipelined)
        report.row(f"first_token.{name}.over_pipeline_bound", seconds, "s", bound, over)
        report.row(f"first_token.{name}.over_unpipelined", seconds, "s", unpipelined, seconds / unpipelined)
    report.row("first_token.over_pipeline_bound", worst, "x", 1.0, worst)
    report.plot(lambda axes: draw(axes, drawn))


def draw(axes: Axes, seconds: dict[str, tuple[float, float, float]]) -> None:
    """`seconds`: measured, bound and unpipelined, by transfer : compute."""
    for number, label in enumerate(("measured", "bound", "unpipelined")):
        places = [index + 0.27 * number for index in range(len(seconds))]
        axes.bar(places, [1e3 * each[number] for each in seconds.values()], width=0.25, label=label)
    axes.set_xticks([index + 0.27 for index in range(len(seconds))], list(seconds))
    axes.set(xlabel="transfer : compute", ylabel="ms until the first token")
    axes.legend()


def link_speed(backend: _transfer.Backend) -> float:
    """Bytes a second of the real link, by one large transfer from pinned memory."""
    size = 256 << 20
    pool = _transfer.DevicePool(backend, size, 1)
    memory = _transfer.HostMemory(backend, size)
    memory.commit(0, size, threads=8)
    engine = _transfer.TransferEngine(backend, pool, chunk_bytes=4 << 20)
    frames = pool.allocate(1)
    best = 0.0
    for _ in range(5):
        transfer = engine.submit(frames, [_transfer.Source.pinned(memory.address)], [size], [1])
        transfer.wait()
        best = max(best, size / transfer.seconds)
    engine.close()
    pool.release(frames)
    pool.close()
    memory.close()
    return best


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("First token after a swap", options, NAMES)
    cuda = uses_cuda(options)
    asyncio.run(measure(report, options.quick, cuda, options.seed))
    report.finish()


if __name__ == "__main__":
    main()
