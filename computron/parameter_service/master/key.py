"""The secret by which the master and aggregators know each other. Workers do not have it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from computron.parameter_service.master.journal import MODE, LogUnusable

BYTES = 32


def key_path(log: Path) -> Path:
    """Beside the log and not in it: whoever has lost the log can still take up what aggregators have."""
    return log.with_name(f"{log.name}.key")


def service_key(log: Path) -> str:
    """Made at the first start. The log is locked. Raises LogUnusable."""
    path = key_path(log)
    try:
        if not path.exists():
            fresh = path.with_name(f"{path.name}.new")
            fresh.unlink(missing_ok=True)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(BYTES))
                file.flush()
                os.fsync(descriptor)
            fresh.rename(path)
        key = path.read_text().strip()
    except OSError as error:
        raise LogUnusable(f"{path}: {error.strerror}; give another file with --log") from error
    if not key:
        raise LogUnusable(f"{path} is empty: remove it, and start all aggregators anew")
    return key
