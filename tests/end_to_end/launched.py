"""`computron launch` in a process of its own, as an operator starts it, and what a machine shows of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import aiohttp
import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from computron.models.byte_tokenizer import byte_tokenizer

COMPUTRON = str(Path(sys.executable).with_name("computron"))
PATIENCE = 60.0  # seconds for what takes a few
VOCABULARY = 300


def checkpoint(folder: Path) -> Path:
    """A Llama of about 2 MB with weights, as another program would have saved it."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def configuration(file: Path, folder: Path, tensor: int, pipeline: int, *, port: int, node_timeout: float) -> Path:
    """Three models, of which the devices hold two: "a" from the checkpoint, "b" and "c" like it with random weights."""
    file.write_text(f"""
server.port = {port}
server.drain_timeout = "10s"
device = {{ kind = "host", memory = "{5 / tensor / pipeline:.2f}MiB", page_size = "64KiB" }}
host.memory = "40MiB"
[group]
tensor_parallel = {tensor}
pipeline_parallel = {pipeline}
node_timeout = "{node_timeout}s"
recovery_timeout = "60s"
[[models]]
id = "a"
source = "{folder}"
[[models]]
id = "b"
source = "random:{folder}"
seed = 1
[[models]]
id = "c"
source = "random:{folder}"
seed = 2
""")
    return file


class Launch:
    """A running `computron launch`. `within`: a command that runs it somewhere, in place of itself."""

    def __init__(self, config: Path, log: Path, *options: str, within: Sequence[str] = ()) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*within, COMPUTRON, "launch", str(config), *options],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def starts(self, rank: int) -> list[int]:
        """The pids of all processes that this node has had."""
        found = re.findall(rf"node_started node={rank} pid=(\d+)", self.log)
        return [int(pid) for pid in found]

    def pid(self, rank: int) -> int:
        return self.starts(rank)[-1]

    def processes(self) -> list[psutil.Process]:
        """All that belongs to it."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self) -> None:
        """As an operator would."""
        self.process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """The exit code."""
        await eventually(lambda: self.process.poll() is not None, "the launch ends", self)
        return int(self.process.returncode)

    def kill(self) -> None:
        """With all that it has started, whatever state that is in."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in reversed(self.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@contextlib.asynccontextmanager
async def launched(config: Path, log: Path, *options: str, within: Sequence[str] = ()) -> AsyncIterator[Launch]:
    """At the end it is stopped in order, unless it has ended, and must leave nothing."""
    launch = Launch(config, log, *options, within=within)
    try:
        yield launch
        if launch.process.poll() is None:
            everything = launch.processes()
            launch.stop()
            assert await launch.ended() == 0, launch.log
            await none_left(everything, launch)
    finally:
        launch.kill()


async def ready(url: str, *launches: Launch) -> None:
    """Wait until the group takes requests."""
    seen = ""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert all(launch.process.poll() is None for launch in launches), logs(launches)
            try:
                async with session.get(f"{url}/health/ready") as response:
                    seen = await response.text()
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                seen = repr(error)
            await asyncio.sleep(0.05)
    raise AssertionError(f"not ready after {PATIENCE} s: {seen}\n{logs(launches)}")


async def eventually(condition: Callable[[], bool], what: str, *launches: Launch) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not after {PATIENCE} s: {what}\n{logs(launches)}"
        await asyncio.sleep(0.02)


async def none_left(processes: Iterable[psutil.Process], *launches: Launch) -> None:
    """Wait until none of these processes runs any more."""
    await eventually(lambda: not any(map(runs, processes)), "all processes have ended", *launches)


def runs(process: psutil.Process) -> bool:
    """Not if it has ended and only waits for somebody to ask how."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def logs(launches: Iterable[Launch]) -> str:
    return "\n".join(f"--- launch {number}\n{launch.log[-8000:]}" for number, launch in enumerate(launches))


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has stopped it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def signal_node(launch: Launch, rank: int, number: signal.Signals) -> None:
    os.kill(launch.pid(rank), number)
