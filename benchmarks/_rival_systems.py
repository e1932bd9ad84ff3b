"""The systems that bench_rivals compares: how each is started, what it says of its loads, what memory it takes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from _processes import HOST, free_port, wait_until_ready

FOLDER = Path(__file__).parent / "rivals"
START_SECONDS = 180
END_SECONDS = 20
SAMPLE_SECONDS = 1.0
CONTEXT = 256  # tokens that a sequence may have, where a system asks
CONFIG = """
[device]
kind = "host"
memory = "{device}B"
[host]
memory = "{host}B"
"""
MODEL = """
[[models]]
id = "{name}"
source = {folder}
task = "{task}"
dtype = "{dtype}"
max_batch_size = {batch}
max_model_len = {context}
"""

_spec = importlib.util.spec_from_file_location("rivals_install", FOLDER / "install.py")
assert _spec is not None
assert _spec.loader is not None
installation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(installation)


@dataclass(frozen=True, slots=True)
class Setup:
    """What all systems get. cache: bytes of device memory for keys and values, which only Computron is held to."""

    task: str
    models: Mapping[str, Path]
    room: int
    cache: int
    dtype: str
    threads: int
    max_batch_size: int
    idle_timeout: int

    @property
    def image(self) -> int:
        """Bytes of the largest model."""
        return max(file_bytes(folder) for folder in self.models.values())


@dataclass(frozen=True, slots=True)
class Loads:
    """models: swap-ins, moves or starts. nbytes: of the parameters that they brought."""

    models: float
    nbytes: float

    def __sub__(self, before: Loads) -> Loads:
        return Loads(self.models - before.models, self.nbytes - before.nbytes)


@dataclass(frozen=True, slots=True)
class System:
    """name_of: the model's name in a request. loads: since its start, from its address and the file of its output."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    ready: str
    name_of: Callable[[str], str]
    loads: Callable[[str, Path], Loads]


class Running:
    """A system that has been started. `peak`: the most memory (PSS, bytes) that its processes took at once so far."""

    def __init__(self, system: System, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = f"http://{HOST}:{system.port}"
        self.name_of = system.name_of
        self.peak = 0
        self._cpu: dict[psutil.Process, float] = {}
        self._system = system
        self._process = psutil.Process(process.pid)
        self._log = log

    def loads(self) -> Loads:
        return self._system.loads(self.url, self._log)

    def tree(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """Of all processes so far; of one that was killed, until it was looked at last."""
        for process in self.tree():
            self._cpu[process] = _cpu_seconds(process) or self._cpu.get(process, 0.0)
        return sum(list(self._cpu.values()))  # the watcher may add one meanwhile

    def watch(self, ended: threading.Event) -> None:
        while not ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(_pss, self.tree())))
            self.cpu_seconds()


@contextmanager
def running(system: System, log: Path) -> Iterator[Running]:
    """Started and ready; stopped afterwards with all its processes. Raises RuntimeError if it does not start."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **system.environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            system.command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    started = Running(system, process, log)
    ended = threading.Event()
    watcher = threading.Thread(target=started.watch, args=(ended,))
    watcher.start()
    try:
        wait_until_ready(started.url + system.ready, START_SECONDS, lambda: _require_alive(process, log))
        yield started
    finally:
        ended.set()
        watcher.join()
        tree = started.tree()
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in psutil.wait_procs(tree, timeout=1)[1]:
            left.kill()


def computron(setup: Setup, scratch: Path) -> System:
    port = free_port()
    config = scratch / "computron.toml"
    text = CONFIG.format(device=setup.room * setup.image + setup.cache, host=(len(setup.models) + 1) * setup.image)
    for name, folder in setup.models.items():
        text += MODEL.format(
            name=name,
            folder=json.dumps(str(folder)),
            task=setup.task,
            dtype=setup.dtype,
            batch=setup.max_batch_size,
            context=CONTEXT,
        )
    config.write_text(text)
    return System(
        command=(
            sys.executable,
            "-m",
            "computron",
            "serve",
            str(config),
            "--port",
            str(port),
            "--log-level",
            "warning",
        ),
        environment=_threads(setup),
        port=port,
        ready="/health/ready",
        name_of=str,
        loads=_loads_of_computron,
    )


def rival(name: str, setup: Setup) -> System:
    """One that has a folder in benchmarks/rivals."""
    port = free_port()
    python = str(installation.python_of(name))
    folders = {name: str(folder) for name, folder in setup.models.items()}
    common = {
        "task": setup.task,
        "dtype": setup.dtype,
        "threads": setup.threads,
        "max_batch_size": setup.max_batch_size,
    }
    given: dict[str, object] = {"port": port, "models": folders, "room": setup.room, **common}
    if name == "transformers_serve":
        command = ["-m", "transformers.cli.transformers", "serve", "--host", HOST, "--port", str(port)]
        command += ["--device", "cpu", "--dtype", setup.dtype, "--model-timeout", str(setup.idle_timeout)]
        return System((python, *command), _threads(setup), port, "/health", folders.__getitem__, _loads_in_log(setup))
    if name == "vllm_cpu":
        vllm = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", "{folder}", "--port", "{port}"]
        vllm += ["--served-model-name", "{model}", "--dtype", setup.dtype, "--max-num-seqs", str(setup.max_batch_size)]
        given |= {"command": [*vllm, "--max-model-len", str(CONTEXT), "--enforce-eager"], "ready": "/health"}
        program, environment = "switcher", {**_threads(setup), "VLLM_CPU_KVCACHE_SPACE": "1"}
    else:
        program, environment = name, _threads(setup)
    server = str(FOLDER / program / "server.py")
    return System((python, server, json.dumps(given)), environment, port, "/stats", str, _loads_of_rival)


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _threads(setup: Setup) -> dict[str, str]:
    """Threads that wait sleep, as they do in Computron by default: a loading thread shall not find both cores busy."""
    return {"OMP_NUM_THREADS": str(setup.threads), "OMP_WAIT_POLICY": "passive"}


def _loads_of_computron(url: str, log: Path) -> Loads:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        return computron_loads(response.read().decode())


def computron_loads(metrics: str) -> Loads:
    """From Prometheus' text: swap-ins after which a model was there, also if part of it had stayed, and the bytes."""
    swaps = re.findall(r"^computron_swap_ins_total\{[^}]*\} (\S+)", metrics, re.M)
    nbytes = re.findall(r"^computron_transfer_bytes_total\{[^}]*\} (\S+)", metrics, re.M)
    return Loads(sum(map(float, swaps)), sum(map(float, nbytes)))


def _loads_of_rival(url: str, log: Path) -> Loads:
    with urllib.request.urlopen(f"{url}/stats") as response:
        stats = json.load(response)
    return Loads(stats["loads"], stats["bytes"])


def _loads_in_log(setup: Setup) -> Callable[[str, Path], Loads]:
    def loads(url: str, log: Path) -> Loads:
        folders = re.findall(r"Loading (\S+)@main", log.read_text(errors="replace"))
        return Loads(len(folders), sum(file_bytes(Path(folder)) for folder in folders))

    return loads


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _require_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{log.stem} ended at once: {(lines or ['without a word'])[-1]}")
