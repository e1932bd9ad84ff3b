"""Where this process stands among the nodes, as the launcher's environment variables say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from computron.errors import ConfigError

LEADER = 0  # its rank


@dataclass(frozen=True, slots=True)
class Place:
    """This node's place. `local_*`: among the nodes of this host. `agent_store`: the launcher listens on `master_port`
    itself, as torchrun does.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_host: str
    master_port: int
    agent_store: bool = False

    @property
    def leader(self) -> bool:
        return self.rank == LEADER

    @property
    def control_port(self) -> int:
        """Where the leader listens for the other nodes."""
        return self.master_port + self.agent_store

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, nodes: int | None = None) -> Place | None:
        """The place that these variables describe (None: those of this process), as torchrun and others set them.

        None if neither RANK nor WORLD_SIZE is set: nobody has started this process as one of many. Raises ConfigError,
        naming the variable, if one is missing or wrong, or if WORLD_SIZE is not `nodes`, the configuration's number.
        """
        variables = os.environ if environment is None else environment
        if not variables.get("RANK") and not variables.get("WORLD_SIZE"):
            return None
        world_size = _integer(variables, "WORLD_SIZE", "the number of nodes", low=1)
        if nodes is not None and world_size != nodes:
            raise ConfigError(
                f"WORLD_SIZE is {world_size}, but the configuration's tensor_parallel times pipeline_parallel makes "
                f"{nodes} node{'s' if nodes > 1 else ''}: start as many processes, or change [group]",
                param="group",
            )
        rank = _integer(variables, "RANK", "this node's number", high=world_size - 1, bound="below WORLD_SIZE")
        local_world_size = _integer(
            variables, "LOCAL_WORLD_SIZE", "the number of nodes on this host", 1, world_size, "at most WORLD_SIZE"
        )
        local_rank = _integer(
            variables,
            "LOCAL_RANK",
            "this node's number on this host",
            0,
            local_world_size - 1,
            "below LOCAL_WORLD_SIZE",
        )
        host = variables.get("MASTER_ADDR", "").strip()
        if not host:
            raise ConfigError(_missing("MASTER_ADDR", "the name or address of the leader's host"))
        port = _integer(variables, "MASTER_PORT", "a free port on the leader's host", 1, 65535)
        agent_store = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if agent_store and port == 65535:
            raise ConfigError("MASTER_PORT is 65535, and Computron needs the port above torchrun's: choose a lower one")
        return cls(rank, world_size, local_rank, local_world_size, host, port, agent_store)


def _integer(
    variables: Mapping[str, str], name: str, meaning: str, low: int = 0, high: int | None = None, bound: str = ""
) -> int:
    """The variable's value. `bound`: what `high` means, in words."""
    text = variables.get(name, "").strip()
    if not text:
        raise ConfigError(_missing(name, meaning))
    if not (text.isascii() and text.lstrip("-").isdigit()):
        raise ConfigError(f'{name} is "{text}"; it must be a whole number: {meaning}')
    value = int(text)
    if value < low:
        raise ConfigError(f"{name} is {value}; it must be at least {low}: {meaning}")
    if high is not None and value > high:
        limit = bound or f"at most {high}"
        raise ConfigError(f"{name} is {value}; it must be {limit} ({meaning}; at most {high} here)")
    return value


def _missing(name: str, meaning: str) -> str:
    return (
        f"{name} is not set, though RANK or WORLD_SIZE is. It tells {meaning}. Start the nodes with `computron launch` "
        "or torchrun, which set it, or unset RANK and WORLD_SIZE to serve with one node"
    )
