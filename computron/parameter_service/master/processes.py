"""Aggregators' processes on the master's machine. They outlive the master, and the next one finds them again."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

START_TIME = 19  # field of /proc/PID/stat after the name: ticks since boot at which the process began


class Processes:
    """exited: told once for each process that ended, in the event loop's thread."""

    def __init__(
        self, command: Callable[[str], Sequence[str]], exited: Callable[[str], None], environment: Mapping[str, str]
    ) -> None:
        self._command = command
        self._exited = exited
        self._environment = {**os.environ, **environment}
        self._loop = asyncio.get_running_loop()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._watched: dict[str, tuple[int, int]] = {}  # name -> pid, its descriptor

    def start(self, name: str) -> tuple[int, float] | None:
        """Its pid and start time; None if it cannot be started, of which `exited` is told."""
        try:
            child = subprocess.Popen(
                self._command(name), stdin=subprocess.DEVNULL, start_new_session=True, env=self._environment
            )
        except OSError as error:
            log.error("aggregator_not_started aggregator=%s error=%s", name, error)
            self._loop.call_soon(self._exited, name)
            return None
        self._children[name] = child
        began = start_time(child.pid) or 0.0
        self._watch(name, child.pid)
        log.info("aggregator_started aggregator=%s pid=%d", name, child.pid)
        return child.pid, began

    def adopt(self, name: str, pid: int, began: float) -> None:
        """Watch a process that an earlier master started; `exited` is told at once if it is gone."""
        if start_time(pid) != began or not self._watch(name, pid):
            self._loop.call_soon(self._exited, name)

    def close(self) -> None:
        """Watch no more; the processes go on."""
        for _, descriptor in self._watched.values():
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()
        for child in self._children.values():
            child.returncode = child.poll() if child.poll() is not None else 0  # it is not to be waited for

    def _watch(self, name: str, pid: int) -> bool:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        self._watched[name] = pid, descriptor
        self._loop.add_reader(descriptor, self._ended, name)
        return True

    def _ended(self, name: str) -> None:
        pid, descriptor = self._watched.pop(name)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        child = self._children.pop(name, None)
        code = child.wait() if child is not None else None
        level = logging.WARNING if code else logging.INFO  # whether it was to end, the master knows
        log.log(level, "aggregator_ended aggregator=%s pid=%d code=%s", name, pid, code)
        self._exited(name)


def start_time(pid: int) -> float | None:
    """In ticks since boot; None if there is no such process, or it has ended and is only waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else float(fields[START_TIME])


def aggregator_command(master: str, host: str, memory: int, snapshots: Path | None) -> Callable[[str], list[str]]:
    """How the master starts one on its own machine; the API key goes through the environment."""

    def command(name: str) -> list[str]:
        words = [sys.executable, "-m", "computron", "parameter-service", "aggregator"]
        words += ["--master", master, "--host", host, "--identity", name, "--memory", str(memory)]
        return words + (["--snapshots", str(snapshots)] if snapshots is not None else [])

    return command
