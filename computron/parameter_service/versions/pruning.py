"""Snapshots that nobody needs any more are removed, and those found that are complete though nobody has said so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from computron.errors import StorageFailed
from computron.parameter_service.versions.files import MARKS, PARTIAL, finish, is_marked, marks_path, partial_path
from computron.parameter_service.versions.names import begun_of, job_of

UNFINISHED = re.compile(rf".*\.(\d+){re.escape(PARTIAL)}")  # a version that was being written, and its history


def prune(newest: Path, keep: Iterable[Path]) -> list[Path]:
    """Removes the job's snapshots, unfinished ones too, that are older than this finished one: of an earlier step, or
    of an earlier epoch at the same step. Those of the paths `keep` stay. Returns which were removed.

    Raises StorageFailed if a file cannot be removed.
    """
    limit = begun_of(newest)
    assert limit is not None, f"{newest} is no snapshot's path"
    kept = {path.name for path in keep}
    kept |= {beside(Path(name)).name for name in kept for beside in (partial_path, marks_path)}
    removed = []
    for path in sorted(newest.parent.iterdir()):
        begun = _begun_of(path)
        if begun is not None and begun < limit and path.name not in kept:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageFailed(
                    f"{path} cannot be removed: {error.strerror}; see that its folder can be written"
                ) from error
            removed.append(path)
    return removed


def recover(folder: Path, blocks: int) -> list[tuple[int, Path]]:
    """The steps and paths of the complete snapshots in a job's folder, the oldest first. One that all of the job's
    `blocks` are marked in, though nobody has finished it, is finished. Raises StorageFailed, CheckpointError.
    """
    if not folder.is_dir():
        return []
    for partial in sorted(folder.glob(f"*{PARTIAL}")):
        path = partial.with_name(partial.name.removesuffix(PARTIAL))
        if begun_of(path) is not None and is_marked(path, blocks):
            finish(path)
    found = [(begun, path) for path in folder.iterdir() if (begun := begun_of(path)) is not None]
    return [(step, path) for (step, _), path in sorted(found)]


def last_epochs(directory: Path) -> dict[str, int]:
    """The highest epoch that any file in each job's folder is of. Raises OSError."""
    if not directory.is_dir():
        return {}
    folders = [folder for folder in directory.iterdir() if folder.is_dir()]
    return {job_of(folder): max(map(_epoch_of, folder.iterdir()), default=0) for folder in folders}


def _epoch_of(path: Path) -> int:
    """0 where its name does not say it."""
    begun, unfinished = _begun_of(path), UNFINISHED.fullmatch(path.name)
    if begun is not None:
        return begun[1]
    return int(unfinished[1]) if unfinished is not None else 0


def _begun_of(path: Path) -> tuple[int, int] | None:
    """Of a snapshot's file, unfinished ones too, and of what is beside it."""
    return begun_of(path.with_name(path.name.removesuffix(PARTIAL).removesuffix(MARKS)))
