"""Connects the nodes of a group that have something to say to each other, once they have met."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from computron.group.pulse import keep_alive
from computron.group.rendezvous import Arrival, Complete, Meeting, listen, named
from computron.group.sockets import SocketLinks
from computron.models.shard import Shard

_PATIENCE = 5.0  # seconds that one address may take to answer
_GREETING = 1.0  # seconds that a caller may take to say who it is
_LOOK = 0.1  # seconds between two looks whether the attempt was given up
_TAKEN = b"\1"


def connect_sockets(meeting: Meeting) -> SocketLinks:
    """Meet the other nodes and connect."""
    shard = meeting.shard
    _, connections = connect(meeting)
    first = shard.stage * shard.tensor_parallel
    stage = {peer - first: c for peer, c in connections.items() if first <= peer < first + shard.tensor_parallel}
    before, after = shard.rank - shard.tensor_parallel, shard.rank + shard.tensor_parallel
    links = SocketLinks(shard.tensor_rank, stage, connections.get(before), connections.get(after))
    links.watch(meeting.timeout)
    return links


def connect(meeting: Meeting, store_port: int = 0) -> tuple[Complete, dict[int, socket.socket]]:
    """Meet the other nodes, telling them `store_port`, and connect to those that this one talks to: of each pair the
    later calls the earlier. The connections, by rank, end when the other host has been out of reach for the meeting's
    timeout.
    """
    shard = meeting.shard
    connections: dict[int, socket.socket] = {}
    try:
        with listen(meeting.host) as listener:
            met = meeting.exchange(listener.getsockname()[1], store_port)
            peers = peers_of(shard)
            for peer in peers:
                if peer < shard.rank:
                    connections[peer] = _call(meeting, met.nodes[peer], met.secret)
            _answer(meeting, listener, [peer for peer in peers if peer > shard.rank], met.secret, connections)
        meeting.doing = "the nodes have connected, but not become a group"
        for connection in connections.values():
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(connection, meeting.timeout)
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    return met, connections


def peers_of(shard: Shard) -> list[int]:
    """The ranks that this node talks to: those of its stage, and its neighbours in the stages around."""
    first = shard.stage * shard.tensor_parallel
    stage = [rank for rank in range(first, first + shard.tensor_parallel) if rank != shard.rank]
    around = [shard.rank - shard.tensor_parallel, shard.rank + shard.tensor_parallel]
    return sorted([*stage, *(rank for rank in around if 0 <= rank < shard.world)])


def _call(meeting: Meeting, node: Arrival, secret: bytes) -> socket.socket:
    peer = node.rank
    hosts = list(dict.fromkeys([meeting.host, *node.addresses] if peer == 0 else node.addresses))
    meeting.doing = f"node {peer} could not be reached at {', '.join(hosts)}, port {node.port}"
    while True:
        for host in hosts:
            with suppress(OSError):
                connection = socket.create_connection((host, node.port), timeout=min(_PATIENCE, meeting.remaining))
                try:
                    connection.sendall(_greeting(secret, meeting.shard.rank, peer))
                    if connection.recv(1) == _TAKEN:
                        return connection
                except OSError:
                    pass
                connection.close()
        time.sleep(min(_LOOK, meeting.remaining))


def _answer(
    meeting: Meeting, listener: socket.socket, peers: Sequence[int], secret: bytes, calls: dict[int, socket.socket]
) -> None:
    expected: Mapping[bytes, int] = {_greeting(secret, peer, meeting.shard.rank): peer for peer in peers}
    waiting = set(peers)
    while waiting:
        meeting.doing = f"{named(sorted(waiting))} did not call"
        listener.settimeout(min(_LOOK, meeting.remaining))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        peer = None
        try:
            connection.settimeout(min(_GREETING, meeting.remaining))
            peer = expected.get(connection.recv(len(secret) + 8, socket.MSG_WAITALL))
            if peer in waiting:
                connection.sendall(_TAKEN)
        except OSError:
            peer = None
        if peer is None or peer not in waiting:
            connection.close()  # a stranger, or somebody who has gone again
            continue
        calls[peer] = connection
        waiting.remove(peer)


def _greeting(secret: bytes, caller: int, called: int) -> bytes:
    return secret + caller.to_bytes(4, "little") + called.to_bytes(4, "little")
