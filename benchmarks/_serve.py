"""Servers of one model in processes of their own, asked over HTTP by as many clients as chats."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from _processes import HOST, free_port, post, wait_until_ready

from computron.models.demo import cache_folder

ROOT = Path(__file__).parents[1]
EXTRAS = ("fastapi", "uvicorn", "starlette", "openai", "pydantic")
START_SECONDS = 180
END_SECONDS = 30
CONFIG = """
[device]
kind = "{kind}"
memory = "{memory}GiB"
[host]
memory = "{memory}GiB"
[[models]]
id = "model"
source = {source}
dtype = "{dtype}"
max_batch_size = {batch}
"""

Chat = Sequence[Mapping[str, str]]


class Unavailable(Exception):
    """What a server needs cannot be installed here; the message says why."""


class Server:
    """A server that runs only while it is asked, so that it costs the other one nothing."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, model: str) -> None:
        self._process = process
        self._url = f"http://{HOST}:{port}/v1/chat/completions"
        self._model = model
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, chats: Sequence[Chat], *, max_tokens: int) -> int:
        """Send all chats at once; the tokens of the answers, by its own count. Raises RuntimeError if one fails."""

        def one(chat: Chat) -> int:
            body = {"model": self._model, "messages": chat, "max_tokens": max_tokens, "temperature": 0.0}
            return int(post(self._url, {**body, "stream": False})["usage"]["completion_tokens"])

        self._process.send_signal(signal.SIGCONT)
        try:
            with ThreadPoolExecutor(len(chats)) as clients:
                return sum(clients.map(one, chats))
        finally:
            self._process.send_signal(signal.SIGSTOP)


@contextmanager
def transformers_serve(folder: str, *, dtype: str, device: str) -> Iterator[Server]:
    """`transformers serve --continuous-batching`. Raises Unavailable, or RuntimeError if it does not start."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--continuous-batching"]
    command += ["--port", str(port), "--host", HOST, "--device", device, "--dtype", dtype]
    with _running(command, port, "/health", {"PYTHONPATH": str(_extras())}) as process:
        yield Server(process, port, folder)


@contextmanager
def computron_serve(folder: str, *, dtype: str, device: str, batch: int) -> Iterator[Server]:
    """`computron serve` with memory for the model and its cache. Raises RuntimeError if it does not start."""
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    text = CONFIG.format(
        kind="cuda" if device == "cuda" else "host",
        memory=2 + size // (1 << 30),
        source=json.dumps(folder),
        dtype=dtype,
        batch=batch,
    )
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "serve.toml"
        config.write_text(text)
        command = [sys.executable, "-m", "computron", "serve", str(config), "--port", str(port)]
        with _running(command, port, "/health/ready", {}) as process:
            yield Server(process, port, "model")


@contextmanager
def _running(
    command: Sequence[str], port: int, ready: str, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **threads, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_until_ready(f"http://{HOST}:{port}{ready}", START_SECONDS, lambda: _require_alive(process, output))
            yield process
        finally:
            process.terminate()
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _extras() -> Path:
    """A folder with what transformers serve needs beside transformers; made once."""
    folder = cache_folder() / "transformers-serve"
    if all(importlib.util.find_spec(name) for name in EXTRAS) or folder.is_dir():
        return folder
    target = folder.with_suffix(".partial")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(target), *EXTRAS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"what transformers serve needs cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    target.rename(folder)
    return folder


def _require_alive(process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
    if process.poll() is None:
        return
    name = " ".join(map(str, process.args[2:4])) if isinstance(process.args, list) else str(process.args)
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    raise RuntimeError(f"{name} ended at once: {(lines or ['without a word'])[-1]}")
