"""Ports for servers that are started later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST, _HIGHEST = 1024, 65535
_GIVEN_TO_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_random = random.SystemRandom()  # not the seeded one: two runs beside each other must not agree


def ports_in_a_row(count: int) -> int:
    """The first of so many free ports.

    None is of those that the kernel gives to connections, where it leaves any: between this call and the start of the
    servers, and while a killed one is away, any connection of the machine could be given such a port.
    """
    first, last = map(int, _GIVEN_TO_CONNECTIONS.read_text().split())
    below, above = range(_LOWEST, first - count + 1), range(last + 1, _HIGHEST - count + 2)
    candidates = max(below, above, key=len) or range(_LOWEST, _HIGHEST - count + 2)
    for _ in range(1000):
        start = _random.choice(candidates)
        if all(map(_free, range(start, start + count))):
            return start
    raise RuntimeError(f"no {count} free ports in a row")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
