"""Run by conftest.py: forks a process with a GroupCommunicator for each three bytes that come in: its rank, and
how many nodes are parallel by tensor and by pipeline.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from multiprocessing.connection import Client, Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from computron.errors import GroupBroken
from computron.group.communicator import GroupCommunicator
from computron.models.shard import Shard

NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def move(name: str) -> None:
    """This thread, and those that it will make, to the network namespace of this name."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        if libc.setns(namespace.fileno(), NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")


def main(address: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while order := os.read(0, 3):
        if not os.fork():
            serve(Client(address), *order)
            return


def serve(connection: Connection, rank: int, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Evaluate what is asked: on the compute thread, answered in order, or at once and unanswered."""
    torch.set_num_threads(1)
    names = {
        "c": GroupCommunicator(Shard.of_rank(rank, tensor_parallel, pipeline_parallel)),
        "torch": torch,
        "move": move,
    }
    orders: SimpleQueue[str | None] = SimpleQueue()

    def compute() -> None:
        while (code := orders.get()) is not None:
            try:
                answer: Any = eval(code, names)
            except GroupBroken as error:
                answer = f"GroupBroken: {error}"
            connection.send(answer)

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    connection.send(os.getpid())
    while True:
        try:
            where, code = connection.recv()
        except (EOFError, OSError):
            break
        if where == "now":
            eval(code, names)
        else:
            orders.put(code)


if __name__ == "__main__":
    main(sys.argv[1])
