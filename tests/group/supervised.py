"""`supervised.py RANKS TIMEOUT DRAIN COMMAND...`: a supervisor in a process of its own. RANKS: like 0,1."""

from __future__ import annotations

import asyncio
import sys

from computron.api.logs import set_up_logging
from computron.group.supervisor import Supervisor


async def main() -> int:
    ranks, timeout, drain, *command = sys.argv[1:]
    environments = {int(rank): {"RANK": rank} for rank in ranks.split(",")}
    return await Supervisor(command, environments, float(timeout), float(drain)).run()


if __name__ == "__main__":
    set_up_logging("info", "text")
    sys.exit(asyncio.run(main()))
