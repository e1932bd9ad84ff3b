from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from computron.errors import GroupBroken
from computron.group import rendezvous
from computron.group.communicator import GroupCommunicator
from computron.group.connecting import peers_of
from computron.group.rendezvous import Meeting, addresses, is_loopback, listen, make_store
from computron.models.shard import Shard

HOST = "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("node", False),
    ],
)
def test_only_names_that_mean_this_host_everywhere_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_group_on_one_host_listens_to_this_host_only() -> None:
    for host, address in ((HOST, HOST), ("127.1.2.3", "127.1.2.3"), ("localhost", HOST)):
        with listen(host) as listener:
            assert listener.getsockname()[0] == address
    assert addresses("localhost") == ["localhost"]


def test_a_group_of_several_hosts_listens_everywhere() -> None:
    with listen("node-a") as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")
        with socket.create_connection((HOST, listener.getsockname()[1])):
            pass


def test_a_leader_whose_own_name_means_loopback_is_still_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on hosts that list their own name as 127.0.1.1."""
    real = socket.getaddrinfo

    def resolve(host: str, *arguments: object, **named: object) -> object:
        return real("127.0.1.1" if host == "node-a" else host, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = addresses("node-a")
    assert is_loopback(found[0])
    assert all(not is_loopback(address) for address in found[1:])


def test_nodes_talk_to_their_stage_and_to_their_neighbours() -> None:
    assert [peers_of(Shard.of_rank(rank, 2, 3)) for rank in range(6)] == [
        [1, 2], [0, 3], [0, 3, 4], [1, 2, 5], [2, 5], [3, 4],
    ]  # fmt: skip


def test_strangers_and_silent_callers_do_not_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("computron.group.connecting._GREETING", 0.1)
    store, port = make_store(HOST)
    shards = [Shard(2, 0), Shard(2, 1)]
    opened: list[int] = []
    real = rendezvous.listen

    def listen_and_be_called(host: str) -> socket.socket:
        listener = real(host)
        opened.append(listener.getsockname()[1])
        return listener

    monkeypatch.setattr("computron.group.connecting.listen", listen_and_be_called)
    communicators = [GroupCommunicator(shard) for shard in shards]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(communicators[0].form, 1, HOST, port, 30.0)
        while not opened:
            threading.Event().wait(0.001)
        strangers = [socket.create_connection((HOST, opened[0])) for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n some more of it")
        strangers[1].close()
        second = threads.submit(communicators[1].form, 1, HOST, port, 30.0)
        first.result(30)
        second.result(30)
    for end in (*strangers, *communicators):
        end.close()
    del store


def test_a_meeting_that_is_given_up_raises() -> None:
    meeting = Meeting(Shard(2, 0), 3, HOST, 1, 30.0)
    assert 29 < meeting.remaining <= 30
    meeting.doing = "node 1 did not come"
    meeting.give_up()
    with pytest.raises(GroupBroken, match="epoch 3 was not formed: node 1 did not come"):
        _ = meeting.remaining


def test_a_store_that_closes_sends_its_guests_away() -> None:
    store, port = make_store(HOST)
    with ThreadPoolExecutor(1) as thread:
        forming = thread.submit(GroupCommunicator(Shard(2, 0)).form, 1, HOST, port, 30.0)
        threading.Event().wait(0.05)
        store.close()
        with pytest.raises(GroupBroken, match=r"node 1 did not come \(the leader closed its store"):
            forming.result(30)


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\2\0\0\0{}",
        b"\377\377\377\377",
        b'\101\0\0\0{"epoch":1,"rank":0,"world":1000000000000,"addresses":[],"port":1}',
    ],
)
def test_strangers_do_not_disturb_a_store(words: bytes) -> None:
    store, port = make_store(HOST)
    with socket.create_connection((HOST, port)) as stranger, ThreadPoolExecutor(2) as threads:
        stranger.sendall(words)
        communicators = [GroupCommunicator(Shard(2, rank)) for rank in range(2)]
        for forming in [threads.submit(c.form, 1, HOST, port, 30.0) for c in communicators]:
            forming.result(30)
    for communicator in communicators:
        communicator.close()
    store.close()


def test_a_node_that_gave_up_is_missing_again() -> None:
    store, port = make_store(HOST)
    shards = [Shard.of_rank(rank, 3, 1) for rank in range(3)]
    with pytest.raises(GroupBroken, match="nodes 1, 2 did not come"):
        GroupCommunicator(shards[0]).form(1, HOST, port, 0.1)
    with pytest.raises(GroupBroken, match="nodes 0, 2 did not come"):
        GroupCommunicator(shards[1]).form(1, HOST, port, 0.1)
    store.close()
