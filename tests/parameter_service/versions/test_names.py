"""Names of jobs and versions become names of files that stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computron.errors import BadRequest
from computron.parameter_service.versions.names import job_folder, job_of, snapshot_path, version_path

ROOT = Path("/snapshots")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=16))
def test_any_job_has_a_folder_of_its_own_right_below_the_root(job: str) -> None:
    folder = job_folder(ROOT, job)
    assert folder.parent == ROOT
    assert folder.name not in (".", "..")
    assert job_of(folder) == job


@pytest.mark.parametrize("job", ["", "x" * 300])
def test_a_job_whose_name_is_empty_or_too_long_is_refused(job: str) -> None:
    with pytest.raises(BadRequest, match="cannot be a job's name"):
        job_folder(ROOT, job)


def test_a_snapshot_is_called_after_its_step_and_epoch() -> None:
    assert snapshot_path(ROOT, "team/lm", 50, 3) == ROOT / "team%2Flm" / "snapshot-50-3.safetensors"


@pytest.mark.parametrize("version", ["v1", "2026-11-22", "1.2.3", "_x"])
def test_a_version_is_called_as_it_is(version: str) -> None:
    assert version_path(ROOT, "lm", version) == ROOT / "lm" / f"{version}.safetensors"


@pytest.mark.parametrize("version", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a b", "a\n", "é", "x" * 300])
def test_a_version_whose_name_is_no_safe_file_name_is_refused(version: str) -> None:
    with pytest.raises(BadRequest, match="cannot be a version's name"):
        version_path(ROOT, "lm", version)


def test_a_version_cannot_be_taken_for_a_snapshot() -> None:
    with pytest.raises(BadRequest, match="snapshots are called so"):
        version_path(ROOT, "lm", "snapshot-50-3")
