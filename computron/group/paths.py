"""Notices that the network between two nodes takes nothing any more, while their other connections may still work."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable

LOOKS = 4  # in the time after which a path counts as dead
_UNACKED, _LAST_SENT, _LAST_ACK = 12, 17, 20  # positions in _INFO's values; the last two are milliseconds ago
_INFO = struct.Struct("@8B24I")  # the start of Linux' struct tcp_info


class PathWatch:
    """Calls `dead` once if one of the connections sends and gets no answer from the network for `timeout` seconds.

    The kernel of a peer answers whether or not the peer reads, so one that is busy or stopped is not taken for dead.
    Looks from a thread of its own until `close`.
    """

    def __init__(self, connections: Iterable[socket.socket], timeout: float, dead: Callable[[], None]) -> None:
        self._connections = list(connections)
        self._timeout = timeout
        self._dead = dead
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="watch-paths", daemon=True).start()

    def close(self) -> None:
        """From any thread. Idempotent."""
        self._closed.set()

    def _run(self) -> None:
        since: dict[socket.socket, float] = {}  # when it was first seen to be without an answer
        while not self._closed.wait(self._timeout / LOOKS):
            now = time.monotonic()
            for connection in self._connections:
                silent = unanswered(connection)
                began = since.setdefault(connection, now)
                if silent == 0 or silent < now - began:
                    del since[connection]
                elif now - began > self._timeout:
                    self._dead()
                    return


def unanswered(connection: socket.socket) -> float:
    """Seconds since the kernel last heard from the peer, if it has sent something since then that is not acknowledged;
    otherwise 0.
    """
    try:
        info = _INFO.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
    except OSError:  # it has been closed
        return 0.0
    owed = info[_UNACKED] and info[_LAST_SENT] < info[_LAST_ACK]
    return info[_LAST_ACK] / 1000 if owed else 0.0
