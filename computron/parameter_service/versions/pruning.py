"""Snapshots that nobody needs any more are removed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from computron.errors import StorageFailed
from computron.parameter_service.versions.files import PARTIAL, partial_path
from computron.parameter_service.versions.names import SNAPSHOT


def prune(newest: Path, keep: Iterable[Path]) -> list[Path]:
    """Removes the job's snapshots, unfinished ones too, that are older than this finished one: of an earlier step, or
    of an earlier epoch at the same step. Those of the paths `keep` stay. Returns which were removed.

    Raises StorageFailed if a file cannot be removed.
    """
    limit = _begun(newest)
    assert limit is not None, f"{newest} is no snapshot's path"
    kept = {path.name for path in keep}
    kept |= {partial_path(Path(name)).name for name in kept}
    removed = []
    for path in sorted(newest.parent.iterdir()):
        begun = _begun(path.with_name(path.name.removesuffix(PARTIAL)))
        if begun is not None and begun < limit and path.name not in kept:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageFailed(
                    f"{path} cannot be removed: {error.strerror}; see that its folder can be written"
                ) from error
            removed.append(path)
    return removed


def _begun(path: Path) -> tuple[int, int] | None:
    """Step and epoch of a snapshot; None if it is none."""
    match = SNAPSHOT.fullmatch(path.name)
    return None if match is None else (int(match[1]), int(match[2]))
