"""Connections that tell of nothing but their end."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import pytest

from computron.group.pulse import Pulse, keep_alive


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with one, other:
        yield one, other


def test_it_tells_which_node_has_gone(ends):
    told: SimpleQueue[str] = SimpleQueue()
    quiet = socket.socketpair()
    pulse = Pulse({3: ends[0], 4: quiet[0]}, told.put)
    with pytest.raises(Empty):
        told.get(timeout=0.05)
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends[1].close()
    assert told.get(timeout=20) == "node 3 is lost: Connection reset by peer"
    assert quiet[1].recv(1) == b"", "the others notice too"
    pulse.close()
    quiet[1].close()


def test_an_end_that_was_wanted_is_told_to_the_others_only(ends):
    told: SimpleQueue[str] = SimpleQueue()
    here = Pulse({1: ends[0]}, lambda reason: told.put(f"here: {reason}"))
    Pulse({0: ends[1]}, lambda reason: told.put(f"there: {reason}"))
    here.close()
    here.close()
    assert told.get(timeout=20) == "there: node 0 is lost: it has ended the connection"
    assert told.empty()


@pytest.mark.parametrize(
    ("timeout", "seconds"), [(0.5, 2), (1, 2), (2, 2), (10, 10), (60, 60), (300, 300), (86400, 15 * 128)]
)
def test_the_kernel_asks_as_long_as_the_timeout_is(ends, timeout, seconds):
    keep_alive(ends[0], timeout)
    assert ends[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle, pause, questions = (ends[0].getsockopt(socket.IPPROTO_TCP, option) for option in options)
    assert idle + questions * pause == seconds
    assert pause <= 15
