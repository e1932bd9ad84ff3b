"""The `launch` command: which nodes of a group this host runs, and what each is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from computron.config import Config
from computron.errors import ConfigError
from computron.group.starting import Command, Starter, Warm
from computron.group.supervisor import Supervisor

LOOPBACK = "127.0.0.1"
# What libraries read when they are loaded. Threads that wait shall sleep, and numpy shall start none.
WARM = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"), "OPENBLAS_NUM_THREADS": "1"}
DEFAULT_PORT = 29500  # of the leader's meeting point, where there are several hosts


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the leader listens for the other nodes. Port 0: any free one, which only works within one host."""

    host: str = LOOPBACK
    port: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """The nodes of a group that one host runs: `count` of `world_size`, from rank `first` on."""

    first: int
    count: int
    world_size: int
    meeting: Meeting

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def leads(self) -> bool:
        return self.first == 0

    def environments(self, threads: int) -> Mapping[int, Mapping[str, str]]:
        """What torchrun would set, for each rank. `threads`: what a node may compute with."""
        return {
            rank: {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_RANK": str(rank - self.first),
                "LOCAL_WORLD_SIZE": str(self.count),
                "MASTER_ADDR": self.meeting.host,
                "MASTER_PORT": str(self.meeting.port),
                "OMP_NUM_THREADS": str(threads),
            }
            for rank in self.ranks
        }


def share_of(
    nodes: int,
    *,
    asked: int | None = None,
    hosts: Sequence[str] = (),
    host_rank: int | None = None,
    rendezvous: str | None = None,
) -> Share:
    """This host's share of a group of `nodes`.

    `asked`: how many nodes the user expects. `hosts`: all of them, in the order of their ranks; none: this one alone.
    Raises ConfigError, in terms of the command's options.
    """
    if asked is not None and asked != nodes:
        raise ConfigError(
            f"--nodes is {asked}, but the configuration's tensor_parallel times pipeline_parallel makes {nodes}; "
            "change [group], or leave --nodes out",
            param="group",
        )
    if len(hosts) <= 1:
        if host_rank not in (None, 0):
            raise ConfigError("--host-rank needs --hosts with the names of all hosts")
        return Share(0, nodes, nodes, _meeting(rendezvous, Meeting()))
    if host_rank is None:
        raise ConfigError(f"--hosts names {len(hosts)} hosts: say with --host-rank which of them this one is, from 0")
    if host_rank >= len(hosts):
        raise ConfigError(f"--host-rank is {host_rank}, but --hosts names only {len(hosts)}; the first is 0")
    if nodes % len(hosts):
        raise ConfigError(f"{nodes} nodes cannot be spread evenly over {len(hosts)} hosts", param="group")
    meeting = _meeting(rendezvous, Meeting(hosts[0], DEFAULT_PORT))
    if meeting.port == 0:
        raise ConfigError("--rendezvous: port 0 is a different one on each host; choose one, like 29500")
    count = nodes // len(hosts)
    return Share(host_rank * count, count, nodes, meeting)


def _meeting(rendezvous: str | None, default: Meeting) -> Meeting:
    if rendezvous is None:
        return default
    match = re.fullmatch(r"(?:\[([^]]+)\]|([^:\s]+)):(\d{1,5})", rendezvous)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(f'--rendezvous: "{rendezvous}" must look like host:port, or [::1]:port')
    return Meeting(match[1] or match[2], int(match[3]))


def threads_per_node(nodes: int) -> int:
    """What OMP_NUM_THREADS says, otherwise this host's cores divided among its nodes."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else max(1, len(os.sched_getaffinity(0)) // nodes)


def serve_command(config: Path, options: Mapping[str, str | int | None]) -> list[str]:
    """A node's command line. `options`: those of `computron serve`, by name; None: as the file says."""
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [sys.executable, "-P", "-m", "computron", "serve", str(config), *given]


def launch(config: Config, share: Share, command: Sequence[str], libraries: Sequence[str] = ()) -> int:
    """Run this host's nodes until they have ended for good. Returns the exit code.

    `libraries`: modules that take long to load; that is then done once, for all nodes and all their starts. Raises
    ConfigError if there is no free port where the nodes are to meet.
    """
    with contextlib.ExitStack() as stack:
        if share.meeting.port == 0:
            share = replace(share, meeting=stack.enter_context(reserved(share.meeting.host)))

        threads = threads_per_node(share.count)
        starter: Starter = Command(command)
        if libraries:
            starter = Warm(Command(command), libraries, WARM | {"OMP_NUM_THREADS": str(threads)})
            stack.callback(starter.close)
            starter.wait()

        async def run() -> int:
            supervisor = Supervisor(
                starter, share.environments(threads), config.group.node_timeout, config.server.drain_timeout
            )
            return await supervisor.run()

        # The standard library's loop: uvloop keeps SIGCHLD for itself.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(run())


@contextlib.contextmanager
def reserved(host: str) -> Iterator[Meeting]:
    """A free port of this host for the leader to listen on, which is kept from others even while the leader restarts.

    Held by a socket that is bound but does not listen: the leader can bind the same port again and again, since both
    set SO_REUSEADDR, and nobody is given it as a free one. Raises ConfigError.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        holder = socket.socket(family, kind)
    except OSError as error:
        raise _no_port(host, error) from error
    with holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(address)
        except OSError as error:
            raise _no_port(host, error) from error
        yield Meeting(host, holder.getsockname()[1])


def _no_port(host: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"no port for the nodes to meet on {host}: {error.strerror or error}; name an address of this host and a port "
        "with --rendezvous"
    )
