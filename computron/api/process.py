"""The process of a node: alone, as the leader of a group, or as one of the nodes that a leader commands."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace

import uvloop

from computron.api.logs import flush_logs, set_up_logging
from computron.api.server import CannotListen, Reporter, serve
from computron.config import Config, ServerConfig
from computron.errors import CheckpointError, ConfigError, Unavailable
from computron.group.environment import Place
from computron.group.heartbeat import Heartbeat
from computron.group.supervision import CANNOT_START
from computron.group.supervisor import RESTARTS
from computron.metrics import Metrics
from computron.node.follower import Follower
from computron.node.node import Node


class CannotStart(ConfigError):
    """What a node of a group was asked to serve cannot be served; starting it again would not help."""

    exit_code = CANNOT_START


class Silent:
    """The reporter of nodes whose leader reports for all."""

    def loading(self, model: str, done: int, total: int) -> None: ...

    def ready(self, url: str) -> None: ...

    def close(self) -> None: ...


def run(config: Config, reporter: Callable[[], Reporter]) -> int:
    """Serve until a signal, whose number it returns (0: the leader stopped the group), as the environment says.

    Raises CannotStart if the launcher should not try again, and otherwise what the start of the server raises.
    """
    try:
        place = Place.from_environment(nodes=config.group.nodes)
        node = place.rank if place is not None and place.world_size > 1 else None
        set_up_logging(config.server.log_level, config.server.log_format, node=node)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, place, reporter))
    except (ConfigError, CheckpointError, CannotListen) as error:
        if os.environ.get(RESTARTS) != "0":
            raise
        raise CannotStart(error.message, param=error.param) from error
    finally:
        flush_logs()  # before the last words of whoever called this


async def _serve(config: Config, place: Place | None, reporter: Callable[[], Reporter]) -> int:
    heartbeat = Heartbeat.from_environment()
    metrics = Metrics()
    node: Node | Follower
    try:
        if place is None or place.leader:
            node = Node(config, metrics, place)
            signal_number = await serve(config.server, node, metrics, reporter())
        else:
            node = Follower(config, place, metrics)
            signal_number = await serve(_own_port(config.server, place), node, metrics, Silent())
    finally:
        if heartbeat is not None:
            heartbeat.close()
    if isinstance(node, Follower) and node.refusal is not None:
        raise node.refusal
    if node.failure is not None and signal_number == 0:
        raise Unavailable(node.failure)
    return signal_number


def _own_port(server: ServerConfig, place: Place) -> ServerConfig:
    """Nodes of one host listen on neighbouring ports; the leader of the group, if it is one of them, on the first."""
    return replace(server, port=server.port + place.local_rank if server.port else 0)
