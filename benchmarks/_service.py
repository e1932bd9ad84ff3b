"""A Parameter Service in processes of its own: a master, its aggregators, and training jobs beside them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _processes import HOST, free_port, wait_until_ready

START = 60.0  # seconds within which a master has to be ready, and aggregators to have registered
TICKS = os.sysconf("SC_CLK_TCK")
STARTED = re.compile(r"aggregator_started aggregator=\S+ pid=(\d+)")  # in what the master says


def cpu_seconds(pid: int) -> float:
    """User and system time of a running process. Raises ProcessLookupError if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return (int(fields[11]) + int(fields[12])) / TICKS


class RefusedError(RuntimeError):
    """The master does not do what it was asked for; the text says why, and what it logged."""


class Service:
    """url: of the master. folder: of its log, snapshots and versions."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._options = tuple(options)
        self.master: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start the master, or start it again; return when it answers."""
        command = [sys.executable, "-m", "computron", "parameter-service", "master", "--port", str(self.port)]
        command += ["--log", str(self.folder / "log"), "--snapshots", str(self.folder / "files"), *self._options]
        with (self.folder / "output").open("ab") as output:
            self.master = subprocess.Popen(command, stdout=output, stderr=output)
        wait_until_ready(f"{self.url}/health", START, self.require_alive)

    def require_alive(self) -> None:
        if self.master.poll() is not None:
            raise RuntimeError(f"the master ended:\n{self.said()}")

    def said(self) -> str:
        return (self.folder / "output").read_text()[-3000:]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Raises RefusedError."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise RefusedError(f"{path}: {error}: {error.read().decode()}\n{self.said()}") from error

    def aggregators(self) -> list[dict[str, Any]]:
        """Those that run now."""
        return [one for one in self.get("/v1/aggregators")["data"] if one["state"] == "up"]

    def until(self, what: Callable[[], bool], seconds: float = START) -> None:
        """Raises RuntimeError with what the master said if it does not become true."""
        deadline = time.monotonic() + seconds
        while not what():
            self.require_alive()
            if time.monotonic() > deadline:
                raise RuntimeError(f"it did not come to that within {seconds} s:\n{self.said()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """With all aggregators that it ever started and that still run."""
        self.master.terminate()
        self.master.wait()
        for pid in map(int, STARTED.findall((self.folder / "output").read_text())):
            try:
                if self.url in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue


@contextmanager
def service(aggregators: int, *options: str, memory: str = "2GiB") -> Iterator[Service]:
    """With exactly so many aggregators, unless `options` say otherwise; ready when they are."""
    with tempfile.TemporaryDirectory(prefix="computron-") as folder:
        sizes = ("--aggregators", f"{aggregators}:{aggregators}", "--memory", memory)
        running = Service(Path(folder), (*sizes, *options))
        running.start()
        try:
            running.until(lambda: len(running.aggregators()) >= aggregators)
            yield running
        finally:
            running.stop()
