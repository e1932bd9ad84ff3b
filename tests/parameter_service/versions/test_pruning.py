"""Which files of a job are removed when a newer snapshot is complete."""

from __future__ import annotations

from pathlib import Path

from computron.parameter_service.versions.files import marks_path, partial_path
from computron.parameter_service.versions.names import snapshot_path, version_path
from computron.parameter_service.versions.pruning import last_epochs, prune


def test_pruning_removes_what_is_older_and_keeps_versions_and_what_it_is_told(tmp_path: Path) -> None:
    newest, kept, old = (snapshot_path(tmp_path, "lm", step, 2) for step in (30, 20, 9))
    stale = [partial_path(snapshot_path(tmp_path, "lm", step, epoch)) for step, epoch in ((15, 1), (30, 1))]
    growing = partial_path(snapshot_path(tmp_path, "lm", 40, 1))
    version = version_path(tmp_path, "lm", "v1")
    staying = [newest, kept, growing, version, partial_path(version), snapshot_path(tmp_path, "other", 10, 1)]
    for file in (*staying, old, *stale):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert sorted(prune(newest, [kept, newest])) == sorted([old, *stale])
    assert not any(file.exists() for file in (old, *stale))
    assert all(file.exists() for file in staying)
    assert prune(newest, [kept]) == []


def test_the_last_epochs_of_files_are_found(tmp_path: Path) -> None:
    assert last_epochs(tmp_path / "nowhere") == {}
    files = [
        snapshot_path(tmp_path, "team/lm", 30, 2),
        partial_path(snapshot_path(tmp_path, "team/lm", 40, 11)),
        marks_path(snapshot_path(tmp_path, "old", 10, 4)),
        partial_path(version_path(tmp_path, "old", "v1"), 7),
        version_path(tmp_path, "published", "v1"),
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert last_epochs(tmp_path) == {"team/lm": 11, "old": 7, "published": 0}
