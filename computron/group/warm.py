"""A process that has loaded libraries and forks a node whenever it is asked to: `python -m computron.group.warm`.

A node is forked twice, so that the supervisor, which adopts what loses its parent, becomes its parent.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from computron.group.heartbeat import VARIABLE
from computron.group.starting import die_with

_CUDA_NOT_INITIALIZED = 3


def main() -> None:
    """Arguments: the socket's file descriptor, the supervisor's pid, what to load and what to run, as JSON."""
    fd, supervisor, text = sys.argv[1:]
    wanted = json.loads(text)
    with socket.socket(fileno=int(fd)) as requests:
        for module in wanted["modules"]:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # the collector would write to the pages that all share
        requests.send((why_not() or "ready").encode())
        heartbeat = fork_on_request(requests, int(supervisor))
    if heartbeat is not None:
        os.environ[VARIABLE] = str(heartbeat)
        run(wanted["arguments"])


def why_not() -> str | None:
    """What stands against forking this process; None: nothing."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"loading the libraries started {threads - 1} threads, which a fork would lose"
    if "libcuda.so" in Path("/proc/self/maps").read_text():
        count = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count)) != _CUDA_NOT_INITIALIZED:
            return "loading the libraries initialised CUDA, which does not survive a fork"
    return None


def fork_on_request(requests: socket.socket, supervisor: int) -> int | None:
    """Returns in each node: its heartbeat's file descriptor. In this process when the supervisor has gone: None."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 1)
        if not data:
            return None
        if os.fork() == 0:
            parent = os.getpid()
            if os.fork() != 0:
                os._exit(0)
            os.setsid()
            while os.getppid() == parent:
                time.sleep(0.001)
            die_with(supervisor)
            os.environ.update(json.loads(data))
            requests.send(str(os.getpid()).encode())
            return descriptors[0]
        os.close(descriptors[0])
        os.wait()


def run(command: list[str]) -> None:
    """Do what `python -P -m MODULE ARGUMENTS` or `python FILE ARGUMENTS` would, given as such a command."""
    if "-m" in command[:3]:
        module, *arguments = command[command.index("-m") + 1 :]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = command[1:]
        runpy.run_path(command[1], run_name="__main__")


if __name__ == "__main__":
    main()
