"""Where the files of a job stand: all in one folder of the job's name."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

from computron.errors import BadRequest

SUFFIX = ".safetensors"
SNAPSHOT = re.compile(r"snapshot-(\d+)-(\d+)\.safetensors")
VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
LONGEST = 200  # bytes of a file's name, which may be 255 with its endings


def job_folder(directory: Path, job: str) -> Path:
    """Any name will do: what a path takes amiss in it is written as %XX. Raises BadRequest if empty or too long."""
    folder = quote(job, safe="")
    if folder.startswith("."):
        folder = f"%2E{folder[1:]}"
    if not folder or len(folder) > LONGEST:
        raise BadRequest(
            f"{job!r} cannot be a job's name: it is empty or too long (at most {LONGEST} bytes)", param="job"
        )
    return directory / folder


def job_of(folder: Path) -> str:
    """Whose folder it is."""
    return unquote(folder.name)


def snapshot_path(directory: Path, job: str, step: int, epoch: int) -> Path:
    return job_folder(directory, job) / f"snapshot-{step}-{epoch}{SUFFIX}"


def begun_of(path: Path) -> tuple[int, int] | None:
    """Step and epoch of a snapshot's file; None if it is none."""
    match = SNAPSHOT.fullmatch(path.name)
    return None if match is None else (int(match[1]), int(match[2]))


def version_path(directory: Path, job: str, version: str) -> Path:
    """Raises BadRequest as `check_version` does."""
    check_version(version)
    return job_folder(directory, job) / f"{version}{SUFFIX}"


def check_version(version: str) -> None:
    """Raises BadRequest if this cannot be the name of a version, which is also that of its file."""
    if not VERSION.fullmatch(version) or len(version) > LONGEST:
        raise BadRequest(
            f"{version!r} cannot be a version's name: use at most {LONGEST} letters, digits, '_', '-' and '.', "
            "neither of the last two at the beginning",
            param="version",
        )
    if SNAPSHOT.fullmatch(f"{version}{SUFFIX}"):
        raise BadRequest(f"{version!r} cannot be a version's name: snapshots are called so", param="version")
