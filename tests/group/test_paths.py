from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from computron.group import paths
from computron.group.paths import PathWatch, unanswered


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with one, other:
        yield one, other


def test_a_peer_that_does_not_read_is_not_taken_for_dead(ends):
    one, _ = ends
    dead = threading.Event()
    one.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            one.send(bytes(1 << 20))
    watch = PathWatch([one], 0.2, dead.set)
    assert not dead.wait(1.0)
    watch.close()


@pytest.mark.parametrize(
    ("answers", "found"), [([9.0], True), ([9.0, 0.0], False), ([9.0, 0.001], False)], ids=["never", "all", "some"]
)
def test_a_path_is_dead_when_nothing_is_answered(monkeypatch, ends, answers, found):
    looks = itertools.cycle(answers)
    monkeypatch.setattr(paths, "unanswered", lambda connection: next(looks))
    dead = threading.Event()
    watch = PathWatch(ends[:1], 0.1, dead.set)
    assert dead.wait(10.0 if found else 1.0) == found
    watch.close()


def test_an_idle_and_a_closed_connection_wait_for_nothing(ends):
    one, other = ends
    one.sendall(b"x")
    assert other.recv(1) == b"x"
    assert unanswered(one) == 0
    one.close()
    assert unanswered(one) == 0
