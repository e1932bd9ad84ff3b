"""Ports for servers that are started later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 10_000
_random = random.SystemRandom()  # not the seeded one: two runs beside each other must not agree


def free_ports(count: int) -> int:
    """The first of so many free ports in a row.

    None is of those that the kernel gives to connections: between this call and the start of the servers, and while
    a killed one is away, any connection of the machine could be given such a port.
    """
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        first = _random.randrange(_LOWEST, end - count)
        if all(map(_free, range(first, first + count))):
            return first
    raise RuntimeError(f"no {count} free ports in a row from {_LOWEST} to {end}")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
