"""Who shares memory with whom."""

from __future__ import annotations

import os
import uuid
from functools import cache
from pathlib import Path

SHARED_VARIABLE = "COMPUTRON_SHARED_MEMORY"


@cache
def machine_id() -> str:
    """The same for two processes that reach each other by abstract Unix sockets: same boot, same network namespace.

    A process in whose environment COMPUTRON_SHARED_MEMORY is 0 shares with nobody: everything goes by TCP.
    """
    if os.environ.get(SHARED_VARIABLE) == "0":
        return f"alone-{uuid.uuid4().hex}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
