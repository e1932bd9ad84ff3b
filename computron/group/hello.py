"""The first words on a connection between nodes: who is there, and whether they belong together."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

PING = b""  # a message that only says: I am here


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A node to the leader. `settings`: what all nodes of a group must agree on, by the name of the setting.
    `incarnation`: tells this process from all others that ever have the same rank.
    """

    rank: int
    world_size: int
    settings: dict[str, str]
    host: str
    pid: int
    incarnation: str = ""


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The leader takes the node in. `timeout`: seconds of silence after which either takes the other for lost."""

    timeout: float


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """The leader does not take the node in."""

    reason: str


Answer = Welcome | Refusal

_hello = msgspec.msgpack.Decoder(Hello)
_answer: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Hello | Answer) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_hello(body: bytes) -> Hello:
    """Raises msgspec.ValidationError or msgspec.DecodeError if it is none."""
    return _hello.decode(body)


def decode_answer(body: bytes) -> Answer:
    """Raises as `decode_hello`."""
    return _answer.decode(body)


def why_refused(hello: Hello, world_size: int, settings: Mapping[str, str]) -> str | None:
    """Why this node cannot be one of a group of `world_size` with the leader's `settings`; None: it can."""
    if hello.world_size != world_size or not 0 < hello.rank < world_size:
        return (
            f"a node said that it is rank {hello.rank} of {hello.world_size}; this group has the ranks 1 to "
            f"{world_size - 1} beside its leader: start all nodes with the same configuration and number of nodes"
        )
    for name in (*settings, *(hello.settings.keys() - settings.keys())):
        here, there = settings.get(name), hello.settings.get(name)
        if here != there:
            return (
                f"node {hello.rank} on {hello.host} has another configuration than the leader: {name} is "
                f"{_shown(there)} there and {_shown(here)} here; give all nodes the same file and version"
            )
    return None


def _shown(value: str | None) -> str:
    return "not set" if value is None else value
