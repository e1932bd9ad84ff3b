"""Does swapping scale with the nodes that share a model, and what does a swapped request cost beside load and model?

Computron's experiment 1 of 2023: two models of OPT's shape, room for one, blocking requests of one token to the one and
the other in turn, over tensor parallel x pipeline parallel nodes. Here each node is a process of its own with its own
link, requests go over HTTP to the leader, and every swap moves the whole model (which is verified), none ahead of time.

load       transfer on the slowest node, from its first chunk to its last, as the server tells in each answer
response   the client's, as users have it: layers run while later ones are still on the link
model      the step, from its beginning in the leader to its output there, in a second group of the same nodes, which
           begins it only once the whole model has come: nothing of one can hide behind the other. `resident`: the same
           where the model had been there before, so that whatever slows a step after a swap can be seen
overhead   response - load - model in that second group, for each request: all that is neither a transfer nor the step.
           That is waiting for the scheduler, for orders to nodes and for their reports, transfers that begin later on
           one node than on another, mapping of pages, and HTTP. Exact, since the three follow each other; a request in
           which they overlap ends the benchmark with an error
limit      bytes of the model / bytes of the largest shard, both as moved in this run: no speed-up of load exceeds it

On the host, links are emulated, so that a swap over one node takes a second, and nodes share this machine's cores;
compare speed-ups and overheads with the published ones (4 A100s), not seconds. On CUDA each node has a GPU and its
link; what needs more GPUs than there are is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from _common import Report, arguments, uses_cuda
from _parallel_nodes import Answer, Group, running
from rich.console import Console
from rich.table import Table

from computron.config import Config, DeviceConfig, GroupConfig, HostConfig, ModelConfig, SchedulerConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Grid:
    tensor: int
    pipeline: int

    @property
    def nodes(self) -> int:
        return self.tensor * self.pipeline

    @property
    def name(self) -> str:
        return f"parallel.{self.tensor}x{self.pipeline}"


@dataclass(frozen=True)
class Published:
    """Seconds on 4 A100s with OPT-13B."""

    load: float
    model: float
    response: float

    @property
    def overhead(self) -> float:
        return self.response - self.load - self.model


ALONE: Final = Grid(1, 1)
PUBLISHED: Final = {
    ALONE: Published(1.350, 0.040, 1.408),
    Grid(2, 1): Published(0.732, 0.047, 0.801),
    Grid(4, 1): Published(0.689, 0.050, 0.761),
    Grid(1, 2): Published(0.858, 0.049, 0.924),
    Grid(1, 4): Published(0.645, 0.061, 0.722),
    Grid(2, 2): Published(0.423, 0.057, 0.502),
}
QUICK: Final = (ALONE, Grid(2, 1), Grid(1, 2))


def promised(grids: Sequence[Grid]) -> list[str]:
    speedups = [f"{grid.name}.load_speedup" for grid in grids if grid != ALONE]
    return speedups + [f"{grid.name}.overhead_ms" for grid in grids]


NAMES: Final = tuple(promised(tuple(PUBLISHED)))
MODELS: Final = ("a", "b")
PROMPT: Final = list(range(5, 13))
WARM_UP: Final = 4  # swaps: the scheduler must know how long swaps and steps take
MIB: Final = 1 << 20


@dataclass(frozen=True)
class Shape:
    """OPT-30B's, its width and vocabulary divided by `scale`."""

    scale: int
    layers: int

    @property
    def width(self) -> int:
        return 7168 // self.scale

    @property
    def vocabulary(self) -> int:
        return -(-50272 // self.scale // 4) * 4

    @property
    def nbytes(self) -> int:
        """Nearly: without norms and biases."""
        return 2 * (12 * self.layers * self.width**2 + self.vocabulary * self.width)

    def save(self, folder: str) -> None:
        from transformers import OPTConfig

        OPTConfig(
            hidden_size=self.width, word_embed_proj_dim=self.width, ffn_dim=4 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=28, vocab_size=self.vocabulary,
            max_position_embeddings=64, bos_token_id=2, eos_token_id=2, pad_token_id=1,
        ).save_pretrained(folder)  # fmt: skip


@dataclass(frozen=True)
class Alternation:
    """`swaps`: requests whose model had to come. `resident`: the next ones, whose model was there."""

    swaps: list[Answer]
    resident: list[Answer]
    largest: int  # bytes that one swap moved to the node where that is most

    def median(self, field: str) -> float:
        return float(statistics.median(getattr(swap, field) for swap in self.swaps))

    @property
    def resident_step(self) -> float:
        return statistics.median(answer.step for answer in self.resident)


@dataclass(frozen=True)
class Result:
    """The same alternation with and without overlap of load and step."""

    overlapped: Alternation
    sequential: Alternation

    def overhead_ms(self, part: str) -> float:
        """Median; `part` is "all" or a field of Overhead."""
        parts = overheads(self.sequential.swaps)
        return 1e3 * float(statistics.median(getattr(overhead, part) for overhead in parts))


@dataclass(frozen=True)
class Overhead:
    """Seconds of one request beside `load` and `model`, by where they went."""

    until_step: float
    http: float

    @property
    def all(self) -> float:
        return self.until_step + self.http


def overheads(swaps: Sequence[Answer]) -> list[Overhead]:
    """Raises RuntimeError where load and step overlapped: what is left beside them would mean nothing."""
    parts = [Overhead(swap.queue - swap.load, swap.response - swap.first_output) for swap in swaps]
    if min(min(part.until_step, part.http) for part in parts) <= 0:
        raise RuntimeError("a step began before its model had come: load and model cannot be told apart")
    return parts


def configure(grid: Grid, folder: str, shape: Shape, seed: int, cuda: bool, bandwidth: float) -> Config:
    """Memory for one model and part of another: whole models leave, as published."""
    memory = 14 * shape.nbytes // (10 * grid.nodes) + (64 if cuda else 4) * MIB
    device = DeviceConfig(kind="cuda" if cuda else "host", memory=memory, link_bandwidth=None if cuda else bandwidth)
    models = tuple(
        ModelConfig(id=name, source=f"random:{folder}", dtype="bfloat16", max_batch_size=1, seed=seed + number)
        for number, name in enumerate(MODELS)
    )
    return Config(
        device=device,
        host=HostConfig(memory=3 * shape.nbytes // grid.nodes + 64 * MIB, load_threads=4 if cuda else 1),
        group=GroupConfig(grid.tensor, grid.pipeline),
        scheduler=SchedulerConfig(policy="lru", prefetch=False),
        models=models,
    )


def alternate(group: Group, rounds: int) -> Alternation:
    """Each model in turn: once so that it must come, and once while it is there. Raises RuntimeError if that fails."""
    swaps, resident, total = [], [], 0
    for number in range(WARM_UP + rounds):
        model = MODELS[number % len(MODELS)]
        swap, again = group.ask(model, PROMPT), group.ask(model, PROMPT)
        total += swap.nbytes
        if swap.nbytes * (number + 1) != total or again.nbytes or not swap.nbytes:
            raise RuntimeError(f"{model} was not swapped as a whole: {swap.nbytes} bytes, then {again.nbytes}")
        swaps.append(swap)
        resident.append(again)
    largest = max(group.moved(total)) // len(swaps)
    return Alternation(swaps[WARM_UP:], resident[WARM_UP:], largest)


def measure(grids: Sequence[Grid], shape: Shape, options: argparse.Namespace, cuda: bool) -> dict[Grid, Result]:
    bandwidth = shape.nbytes / options.swap_seconds
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        shape.save(folder)
        for grid in grids:
            config = configure(grid, folder, shape, options.seed, cuda, bandwidth)
            measured = []
            for early_start in (True, False):
                with running(config, early_start=early_start) as group:
                    measured.append(alternate(group, options.rounds))
            results[grid] = Result(*measured)
    return results


def add_rows(report: Report, results: dict[Grid, Result]) -> None:
    alone = results[ALONE].sequential
    for grid, result in results.items():
        sequential, name = result.sequential, grid.name
        load, model = sequential.median("load"), sequential.median("step")
        speedup = alone.median("load") / load
        report.row(f"{name}.load", load, "s", alone.median("load"), 1 / speedup)
        report.row(f"{name}.model", model, "s", sequential.resident_step, model / sequential.resident_step)
        report.row(f"{name}.response", result.overlapped.median("response"), "s")
        report.row(f"{name}.response_without_overlap", sequential.median("response"), "s")
        if grid != ALONE:
            report.row(f"{name}.load_speedup", speedup, "x", grid.nodes, speedup / grid.nodes)
            report.row(f"{name}.speedup_limit", alone.largest / sequential.largest, "x", grid.nodes)
        report.row(f"{name}.overhead_ms", result.overhead_ms("all"), "ms")
        report.row(f"{name}.overhead.until_step_ms", result.overhead_ms("until_step"), "ms")
        report.row(f"{name}.overhead.http_ms", result.overhead_ms("http"), "ms")


def table(results: dict[Grid, Result], title: str) -> Table:
    """The experiment's own table. Ranges are of all requests that were measured."""
    alone, published_alone = results[ALONE].sequential, PUBLISHED[ALONE]
    rows = Table(title=title, title_justify="left")
    for column in (
        "TP,PP", "load\ns", "range", "model\nms", "resident\nms", "response\ns", "speed-up\nof load", "of\nideal",
        "limit", "overhead\nms", "range", "published:\nload s", "\nspeed-up", "\noverhead ms",
    ):  # fmt: skip
        rows.add_column(column, justify="right")
    for grid, result in results.items():
        sequential, published = result.sequential, PUBLISHED[grid]
        loads = [swap.load for swap in sequential.swaps]
        speedup = alone.median("load") / sequential.median("load")
        spread = [1e3 * overhead.all for overhead in overheads(sequential.swaps)]
        rows.add_row(
            f"{grid.tensor},{grid.pipeline}",
            f"{sequential.median('load'):.4f}",
            f"{min(loads):.3f}-{max(loads):.3f}",
            f"{1e3 * sequential.median('step'):.0f}",
            f"{1e3 * sequential.resident_step:.0f}",
            f"{result.overlapped.median('response'):.3f}",
            f"{speedup:.2f}",
            f"{speedup / grid.nodes:.1%}",
            f"{alone.largest / sequential.largest:.2f}",
            f"{result.overhead_ms('all'):.1f}",
            f"{min(spread):.1f}-{max(spread):.1f}",
            f"{published.load:.3f}",
            f"{published_alone.load / published.load:.2f}",
            f"{1e3 * published.overhead:.0f}",
        )
    return rows


def draw(axes: Axes, results: dict[Grid, Result], words: str) -> None:
    """Speed-up of load against nodes."""
    alone = results[ALONE].sequential
    measured = {grid: alone.median("load") / result.sequential.median("load") for grid, result in results.items()}
    published = {grid: PUBLISHED[ALONE].load / each.load for grid, each in PUBLISHED.items()}
    nodes = sorted({grid.nodes for grid in PUBLISHED})
    axes.plot(nodes, nodes, color="black", linestyle="--", label="ideal")
    lines = {
        "tensor parallel": ("C0", [grid for grid in PUBLISHED if grid.pipeline == 1]),
        "pipeline parallel": ("C1", [grid for grid in PUBLISHED if grid.tensor == 1]),
        "both (2,2)": ("C2", [grid for grid in PUBLISHED if 1 not in (grid.tensor, grid.pipeline)]),
    }
    for label, (colour, grids) in lines.items():
        here = [grid for grid in grids if grid in measured]
        axes.plot([g.nodes for g in here], [measured[g] for g in here], "o-", color=colour, label=f"{label}, {words}")
        places, values = [grid.nodes for grid in grids], [published[grid] for grid in grids]
        axes.plot(places, values, "x:", color=colour, label=f"{label}, published (A100s)")
    axes.set(xlabel="nodes", ylabel="speed-up of load", xticks=nodes)
    axes.legend(fontsize="small")


def on_gpus(grids: Sequence[Grid], demanded: bool) -> tuple[Grid, ...]:
    """Those that a GPU for each node can be had for. None of them if it is only one, unless CUDA is demanded."""
    import torch

    count = torch.cuda.device_count()
    fitting = tuple(grid for grid in grids if grid.nodes <= count)
    if len(fitting) < len(grids):
        most = max(grid.nodes for grid in grids)
        print(f"each node needs a GPU of its own: {count} of the {most} for all rows are here")
    return fitting if len(fitting) > 1 or demanded else ()


def main() -> None:
    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=12, help="swaps measured in each group; default: 12")
        parser.add_argument("--swap-seconds", type=float, default=1.0, metavar="S", help="over one link; default: 1")

    options = arguments(__doc__ or "", extend)
    if options.quick:
        options.rounds, options.swap_seconds = min(options.rounds, 6), options.swap_seconds / 4
    grids: tuple[Grid, ...] = QUICK if options.quick else tuple(PUBLISHED)
    cuda = uses_cuda(options)
    if cuda:
        fitting = on_gpus(grids, demanded=options.device == "cuda")
        cuda, grids = bool(fitting), fitting or grids
    words = "real links" if cuda else "emulated links"
    print(f"Device and links: {'one GPU each' if cuda else 'emulated on this machine'}")
    report = Report(f"Swapping in parallel, {words}", options, promised(grids))
    results = measure(grids, Shape(4 if cuda else 16, 12 if options.quick else 48), options, cuda)
    add_rows(report, results)
    title = f"Two models in turn, room for one; {words}. Published: Computron 2023, OPT-13B on 4 A100s"
    Console(width=150).print(table(results, title))
    report.plot(lambda axes: draw(axes, results, words))
    report.finish()


if __name__ == "__main__":
    main()
