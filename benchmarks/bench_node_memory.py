"""How much memory does a node of a group need, against one server that serves the same models alone?

Three models of about 400 MB each are served by one process, and by groups of four nodes that have a quarter of its
device memory and host store each; every node is a `computron serve` in a fresh interpreter, as on a host of its own.
Each model is asked once, so that all have been swapped in. `value` is the node that needs most, `baseline` the single
server; `share`: peak resident memory (VmHWM); `pss.share`, `private.share`: resident at the end, with shared pages
counted by part or not at all; `added.share`: peak above that of a server with next to nothing to serve.

Always on the host backend, whose device memory is the process's own. VmHWM counts that memory twice where it is in use,
since frames are mapped into the model's addresses too. With --quick models are half as large, so that the libraries'
share of everything is larger.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from _common import Report, arguments
from _processes import HOST, free_port, post, wait_until_ready

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = ((4, 1), (2, 2), (1, 4))
NAMES = tuple(f"memory.{tensor}x{pipeline}.share" for tensor, pipeline in GROUPS)
ROOT = Path(__file__).parents[1]
MIB = 1 << 20
START_SECONDS = 300
END_SECONDS = 30
MODELS = 3
SHAPE = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LAYERS = 12  # 390 MB in float32
CONFIG = """
[device]
kind = "host"
memory = "{device}KiB"
[host]
memory = "{host}KiB"
[group]
tensor_parallel = {tensor}
pipeline_parallel = {pipeline}
"""
MODEL = """
[[models]]
id = "{id}"
source = {source}
dtype = "float32"
max_model_len = 64
seed = {seed}
"""


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes. `start`: its peak when the server became ready."""

    start: int
    peak: int
    pss: int
    private: int


def memory_of(pid: int, start: int) -> Memory:
    rolled = _fields(f"/proc/{pid}/smaps_rollup")
    private = rolled["Private_Clean"] + rolled["Private_Dirty"]
    return Memory(start, peak_of(pid), rolled["Pss"], private)


def peak_of(pid: int) -> int:
    return _fields(f"/proc/{pid}/status")["VmHWM"]


def _fields(path: str) -> dict[str, int]:
    """The lines of a file of /proc that are in kB, in bytes."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[-1] == "kB"}


def config_text(folder: Path, models: int, tensor: int, pipeline: int, *, device: int, host: int) -> str:
    """`device`, `host`: bytes of the whole group."""
    nodes = tensor * pipeline
    text = CONFIG.format(device=device // nodes >> 10, host=host // nodes >> 10, tensor=tensor, pipeline=pipeline)
    source = json.dumps(f"random:{folder}")
    tables = (MODEL.format(id=f"model-{seed}", source=source, seed=seed) for seed in range(models))
    return text + "".join(tables)


def measure(text: str, models: int, tensor: int, pipeline: int) -> list[Memory]:
    """Of each node, after every model has answered."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        config = Path(folder) / "serve.toml"
        config.write_text(text)
        port, master = free_port(), free_port()
        nodes = range(tensor * pipeline)
        processes = [
            running.enter_context(_node(config, rank, len(nodes), port, master, Path(folder) / f"{rank}.log"))
            for rank in reversed(nodes)
        ][::-1]
        wait_until_ready(
            f"http://{HOST}:{port}/health/ready", START_SECONDS, lambda: _require_alive(processes, Path(folder))
        )
        starts = [peak_of(process.pid) for process in processes]
        for number in range(models):
            body = {"model": f"model-{number}", "prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True}
            post(f"http://{HOST}:{port}/v1/completions", body)
        return [memory_of(process.pid, start) for process, start in zip(processes, starts, strict=True)]


@contextmanager
def _node(config: Path, rank: int, nodes: int, port: int, master: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One node. The leader, which is stopped last, tells the others to stop."""
    place = {"RANK": rank, "WORLD_SIZE": nodes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": nodes,
             "MASTER_ADDR": HOST, "MASTER_PORT": master}  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "computron", "serve", str(config), "--port", str(0 if rank else port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if rank == 0:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _require_alive(processes: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    for rank, process in enumerate(processes):
        if process.poll() is not None:
            raise RuntimeError(f"node {rank} ended at once: {(logs / f'{rank}.log').read_text()[-500:]}")


def save(folder: Path, shape: dict[str, int], layers: int) -> Path:
    """The configuration of a Llama, for `random:` sources."""
    from transformers import LlamaConfig

    LlamaConfig(
        **shape, num_hidden_layers=layers, num_key_value_heads=shape["num_attention_heads"], max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def run(report: Report, folder: Path, options: argparse.Namespace) -> None:
    layers = LAYERS // 2 if options.quick else LAYERS
    big = save(folder / "big", SHAPE, layers)
    tiny = save(folder / "tiny", TINY, 1)
    scale = layers / LAYERS
    budget = {"device": int(500 * MIB * scale), "host": int(1400 * MIB * scale)}
    (empty,) = measure(config_text(tiny, 1, 1, 1, device=8 * MIB, host=16 * MIB), 1, 1, 1)
    (alone,) = measure(config_text(big, MODELS, 1, 1, **budget), MODELS, 1, 1)
    report.row("memory.empty.peak", empty.peak / MIB, "MiB", alone.peak / MIB, empty.peak / alone.peak)
    drawn = {"1x1": alone}
    for tensor, pipeline in GROUPS:
        nodes = measure(config_text(big, MODELS, tensor, pipeline, **budget), MODELS, tensor, pipeline)
        name = f"{tensor}x{pipeline}"
        drawn[name] = max(nodes, key=lambda node: node.peak)
        for label, field in (("share", "peak"), ("start.share", "start"), ("pss.share", "pss"),
                             ("private.share", "private")):  # fmt: skip
            value, baseline = max(getattr(node, field) for node in nodes), getattr(alone, field)
            report.row(f"memory.{name}.{label}", value / MIB, "MiB", baseline / MIB, value / baseline)
        added, baseline = drawn[name].peak - empty.peak, alone.peak - empty.peak
        report.row(f"memory.{name}.added.share", added / MIB, "MiB", baseline / MIB, added / baseline)
    report.plot(lambda axes: draw(axes, drawn, empty.peak))


def draw(axes: Axes, peaks: dict[str, Memory], empty: int) -> None:
    axes.bar(list(peaks), [memory.peak / MIB for memory in peaks.values()])
    axes.axhline(empty / MIB, color="black", linewidth=1, label="nothing to serve")
    axes.set(ylabel="peak memory of a node (MiB)")
    axes.legend()


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("Memory of a node", options, NAMES)
    with tempfile.TemporaryDirectory() as folder:
        run(report, Path(folder), options)
    report.finish()


if __name__ == "__main__":
    main()
