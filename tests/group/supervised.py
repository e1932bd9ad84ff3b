"""`supervised.py MODULES RANKS TIMEOUT DRAIN COMMAND...`: a supervisor in a process of its own.

RANKS: like 0,1. MODULES: what a warm process loads, like a,b; "-": nodes start cold.
"""

from __future__ import annotations

import asyncio
import sys

from computron.api.logs import set_up_logging
from computron.group.starting import Command, Starter, Warm
from computron.group.supervisor import Supervisor


def starter(modules: str, command: list[str]) -> Starter:
    if modules == "-":
        return Command(command)
    warm = Warm(Command(command), modules.split(","), {})
    warm.wait()
    return warm


async def main() -> int:
    modules, ranks, timeout, drain, *command = sys.argv[1:]
    environments = {int(rank): {"RANK": rank} for rank in ranks.split(",")}
    return await Supervisor(starter(modules, command), environments, float(timeout), float(drain)).run()


if __name__ == "__main__":
    set_up_logging("info", "text")
    sys.exit(asyncio.run(main()))
