"""Plays a node: `stand_in.py FOLDER BEHAVIOUR`. BEHAVIOUR is JSON, by rank: {"0": {"ignore": ["SIGTERM"]}, ...}.

Writes FOLDER/RANK.RESTARTS with its pid and environment. SIGTERM ends it with code 0; a leader tells the others to end
by the file FOLDER/stop. Keys of a behaviour: `ignore`: signals; `exit`: code to end with at its first start; `alone`:
tells nobody; `child`: at its first start, starts a process that would outlive it; `mute`: no heartbeat; `closed`: ends
its heartbeat and stays; `deaf`: does not look at FOLDER/stop.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from computron.group import heartbeat

LEADER_RANK = "0"


async def main(folder: Path, behaviour: dict[str, Any]) -> int:
    rank, restarts = os.environ["RANK"], os.environ["COMPUTRON_RESTARTS"]
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    for name in behaviour.get("ignore", []):
        loop.remove_signal_handler(signal.Signals[name])
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    beat = None if "mute" in behaviour else heartbeat.Heartbeat.from_environment()
    child = subprocess.Popen(["sleep", "1000"]).pid if "child" in behaviour and restarts == "0" else None
    facts = {
        "pid": os.getpid(),
        "child": child,
        "session": os.getsid(0),
        "stdin": os.readlink("/proc/self/fd/0"),
        "environment": dict(os.environ),
    }
    temporary = folder / f".{rank}"
    temporary.write_text(json.dumps(facts))
    temporary.rename(folder / f"{rank}.{restarts}")
    if "exit" in behaviour and restarts == "0":
        return behaviour["exit"]
    if "closed" in behaviour and beat is not None:
        beat.close()
    while not told.is_set() and ("deaf" in behaviour or not (folder / "stop").exists()):
        try:
            await asyncio.wait_for(told.wait(), 0.02)
        except TimeoutError:
            continue
    if rank == LEADER_RANK and "alone" not in behaviour:
        (folder / "stop").touch()
    return 0


if __name__ == "__main__":
    heartbeat.INTERVAL = 0.1
    sys.exit(asyncio.run(main(Path(sys.argv[1]), json.loads(sys.argv[2]).get(os.environ["RANK"], {}))))
