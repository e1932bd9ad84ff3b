"""Two hosts on one machine: network namespaces joined by a cable that can be cut, and one to this process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.launched import Launch, launched, ready
from tests.end_to_end.load import REFUSED, RIGHT, Clients, Outcome

ADDRESSES = ("10.77.0.1", "10.77.0.2")  # of the hosts, to each other
HTTP = 8000
FREE_PORTS = ("to", ADDRESSES[0], "ipproto", "tcp", "dport", "30000-65534")
_made = itertools.count()
NOWHERE = "02:00:00:00:00:99"  # a hardware address that nobody has


@dataclass(frozen=True, slots=True)
class Hosts:
    """`names`: of the namespaces. `address`: of the first host, as this process reaches it."""

    names: tuple[str, str]
    address: str

    @property
    def url(self) -> str:
        return f"http://{self.address}:{HTTP}"

    def within(self, host: int) -> list[str]:
        """A command that runs another one on this host."""
        return ["ip", "netns", "exec", self.names[host]]

    def unplug(self) -> None:
        ip("-n", self.names[0], "link", "set", "dev", "nodes", "down")

    def plug(self) -> None:
        ip("-n", self.names[0], "link", "set", "dev", "nodes", "up")

    def close_ports(self) -> None:
        """The second host does not reach free ports of the first any more, as with a strict firewall."""
        ip("-n", self.names[1], "rule", "add", "prio", "10", *FREE_PORTS, "blackhole")

    def open_ports(self) -> None:
        ip("-n", self.names[1], "rule", "del", "prio", "10")

    def lose(self, host: int) -> None:
        """All packets from this host to the other get lost on the way, silently."""
        to = ADDRESSES[1 - host]
        ip("-n", self.names[host], "neigh", "replace", to, "lladdr", NOWHERE, "dev", "nodes", "nud", "permanent")

    def find(self, host: int) -> None:
        """What `lose` did is over."""
        ip("-n", self.names[host], "neigh", "del", ADDRESSES[1 - host], "dev", "nodes")


def _both(change: Callable[[Hosts, int], None]) -> Callable[[Hosts], None]:
    def change_both(hosts: Hosts) -> None:
        change(hosts, 0)
        change(hosts, 1)

    return change_both


# What can happen to the cable, and how that ends.
CUTS: dict[str, tuple[Callable[[Hosts], None], Callable[[Hosts], None]]] = {
    "link down": (Hosts.unplug, Hosts.plug),
    "all lost": (_both(Hosts.lose), _both(Hosts.find)),
    "lost from leader": (lambda hosts: hosts.lose(0), lambda hosts: hosts.find(0)),
    "lost to leader": (lambda hosts: hosts.lose(1), lambda hosts: hosts.find(1)),
}


def ip(*arguments: str) -> None:
    """Raises RuntimeError with what it said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def why_not() -> str | None:
    """What keeps this process from making hosts; None: nothing."""
    if shutil.which("ip") is None:
        return "there is no `ip` command (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    try:
        with two_hosts():
            return None
    except RuntimeError as error:
        return f"network namespaces cannot be made here: {error}"


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises RuntimeError if they cannot be made. At the end nothing is left of them."""
    number = (os.getpid() + next(_made)) % 16384  # processes that do this at once need addresses of their own
    there, here = (f"10.78.{number // 64}.{4 * (number % 64) + end}" for end in (1, 2))
    names = (f"computron-{number}-a", f"computron-{number}-b")
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "dev", "lo", "up")
        ip("-n", names[0], "link", "add", "nodes", "type", "veth", "peer", "name", "nodes", "netns", names[1])
        cable = f"computron{number}"
        ip("link", "add", cable, "type", "veth", "peer", "name", "clients", "netns", names[0])
        stack.callback(ip, "link", "del", cable)
        for name, address in zip(names, ADDRESSES, strict=True):
            _give(name, "nodes", f"{address}/24")
        _give(names[0], "clients", f"{there}/30")
        ip("address", "add", f"{here}/30", "dev", cable)
        ip("link", "set", "dev", cable, "up")
        yield Hosts(names, there)


def _give(name: str, device: str, address: str) -> None:
    ip("-n", name, "address", "add", address, "dev", device)
    ip("-n", name, "link", "set", "dev", device, "up")


@contextlib.asynccontextmanager
async def launched_on(hosts: Hosts, config: Path, folder: Path) -> AsyncIterator[tuple[Launch, Launch]]:
    """One launch on each host, as docs/parallelism.md says. They take requests, and are stopped in order at the end."""
    options = ["--hosts", ",".join(ADDRESSES), "--rendezvous", f"{ADDRESSES[0]}:29500",
               "--host", "0.0.0.0", "--port", str(HTTP)]  # fmt: skip

    def on(host: int) -> contextlib.AbstractAsyncContextManager[Launch]:
        given = [*options, "--host-rank", str(host)]
        return launched(config, folder / f"host-{host}.log", *given, within=hosts.within(host))

    async with on(1) as second, on(0) as first:
        await ready(hosts.url, first, second)
        yield first, second
        first.stop()
        assert (await first.ended(), await second.ended()) == (0, 0), first.log + second.log


@dataclass(frozen=True, slots=True)
class Cut:
    """What clients saw of it. `noticed`: seconds from the cut to the first refusal, None if there was none; `healed`:
    from the healing to the first answer. `during`: outcomes of the time in between.
    """

    noticed: float | None
    healed: float
    outcomes: list[Outcome]
    during: list[Outcome]


async def cut(hosts: Hosts, clients: Clients, kind: str, seconds: float, patience: float) -> Cut:
    """Cut the cable for so long under load. Raises TimeoutError if there are no answers `patience` after it healed."""
    sever, heal = CUTS[kind]
    async with clients.asking():
        await clients.answered(0, patience, count=3)
        at = time.monotonic()
        sever(hosts)
        try:
            await asyncio.sleep(seconds)
        finally:
            heal(hosts)
        healed = time.monotonic()
        back = await clients.answered(at, patience)
        await clients.answered(healed, patience, count=4)
    outcomes = [outcome for outcome in clients.outcomes if outcome.ended >= at]
    refused = [outcome.ended for outcome in outcomes if outcome.kind == REFUSED]
    during = [o for o in outcomes if o.ended < healed and not (o.kind == RIGHT and o.asked <= at)]
    return Cut(min(refused) - at if refused else None, back - healed, outcomes, during)
