"""`transformers serve --continuous-batching` in a process of its own, asked over HTTP by as many clients as chats."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from computron.models.demo import cache_folder

EXTRAS = ("fastapi", "uvicorn", "starlette", "openai", "pydantic")
START_SECONDS = 180


class Unavailable(Exception):
    """It cannot be measured here; the message says why."""


@contextmanager
def transformers_serve(
    folder: str, chats: Sequence[Sequence[Mapping[str, str]]], *, max_tokens: int, device: str
) -> Iterator[Callable[[], int]]:
    """Gives a call that sends all chats at once and counts the tokens of the answers. Raises Unavailable."""
    port = _free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--continuous-batching"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", device]
    environment = {**os.environ, "PYTHONPATH": str(_extras()), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _wait_for(process, port)

        def ask(chat: Sequence[Mapping[str, str]]) -> int:
            body = {"model": folder, "messages": chat, "max_tokens": max_tokens, "temperature": 0.0, "stream": False}
            answer = _post(f"http://127.0.0.1:{port}/v1/chat/completions", body)
            return int(answer["usage"]["completion_tokens"])

        with ThreadPoolExecutor(len(chats)) as clients:
            yield lambda: sum(clients.map(ask, chats))
    finally:
        process.terminate()
        process.wait()


def _extras() -> Path:
    """A folder with what serving needs beside transformers; made once."""
    folder = cache_folder() / "transformers-serve"
    if all(importlib.util.find_spec(name) for name in EXTRAS) or folder.is_dir():
        return folder
    target = folder.with_suffix(".partial")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(target), *EXTRAS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"its dependencies cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    target.rename(folder)
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout is not None else ""
            raise Unavailable(f"it ended at once: {(output.strip().splitlines() or ['without a word'])[-1]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise Unavailable(f"it was not ready after {START_SECONDS} s")


def _post(url: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise Unavailable(f"it answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
