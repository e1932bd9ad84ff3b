"""Notices that a node is gone, or that its host is out of reach, by a connection on which nothing is ever said."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

_LONGEST = 15  # seconds between two questions, lest firewalls forget a connection that is idle
_QUESTIONS = 4  # without an answer, after which the connection has ended, where a question may be asked so often


def keep_alive(connection: socket.socket, timeout: float) -> None:
    """Let the kernel ask the other one whether it is there while nothing is said, and end the connection when it has
    not answered for about `timeout` seconds, two at least.

    A process that is busy, or stopped, does not matter: its kernel answers. Nothing is asked while something is sent
    that has not been acknowledged. There is no TCP_USER_TIMEOUT, since that would also end a connection whose other
    end reads nothing for so long: a node may wait for minutes for a model before it reads.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        pause = min(max(1, int(timeout / (_QUESTIONS + 1))), _LONGEST)
        questions = min(max(1, round(timeout / pause) - 1), 127)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, questions)


class Pulse:
    """Calls `lost` once, with the reason, when one of the connections ends before `close`. They are `Pulse`'s own, by
    rank, and kept alive.
    """

    def __init__(self, connections: Mapping[int, socket.socket], lost: Callable[[str], None]) -> None:
        self._connections = dict(connections)
        self._lost = lost
        self._closing, self._close = socket.socketpair()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def close(self) -> None:
        """Let the other nodes notice that this one has gone. From any thread. Idempotent."""
        with suppress(OSError):  # it has been closed, or lost
            self._close.shutdown(socket.SHUT_RDWR)
        self._close.close()

    def _run(self) -> None:
        ranks = {connection.fileno(): rank for rank, connection in self._connections.items()}
        poll = select.poll()
        for descriptor in (self._closing.fileno(), *ranks):
            poll.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poll.poll()}
        reason = None
        if self._closing.fileno() not in ended:
            rank = min(ranks[descriptor] for descriptor in ended)
            error = self._connections[rank].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            reason = f"node {rank} is lost: {os.strerror(error) if error else 'it has ended the connection'}"
        for connection in (self._closing, self._close, *self._connections.values()):
            connection.close()
        if reason is not None:
            self._lost(reason)
