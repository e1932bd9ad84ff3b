"""Shared files: ranges, the partial name, what is refused, and words for a disk that does not take them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from computron.errors import CheckpointError, StorageFailed
from computron.parameter_service.versions.files import SharedFile, discard, finish, partial_path

TENSORS = [("b", "float32", (4,)), ("a", "int64", (2, 2))]
B = torch.arange(4, dtype=torch.float32)
A = torch.arange(4).reshape(2, 2)


def write_all(path: Path) -> None:
    with SharedFile(path, TENSORS, {"by": "us"}) as file:
        file.write(0, 0, B.numpy().data)
        file.write(1, 0, A.numpy().data)
        file.sync()


def test_a_finished_file_has_the_bytes_that_the_library_saves(tmp_path: Path) -> None:
    path = tmp_path / "new" / "f.safetensors"
    write_all(path)
    assert not path.exists()
    finish(path)
    assert path.read_bytes() == save({"a": A, "b": B}, {"by": "us"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert os.listdir(path.parent) == [path.name]


def test_ranges_from_several_writers_make_one_tensor(tmp_path: Path) -> None:
    path = tmp_path / "f"
    first, second = (SharedFile(path, TENSORS, {}) for _ in range(2))
    second.write(0, 3, B[3:].numpy().data)
    first.write(0, 0, bytearray(B[:3].numpy().tobytes()))
    first.write(0, 0, b"")
    first.close()
    second.close()
    finish(path)
    assert load_file(path)["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("start", "nbytes"), [(-1, 4), (0, 3), (0, 20), (4, 4), (3, 8)])
def test_what_does_not_fit_the_tensor_is_refused(tmp_path: Path, start: int, nbytes: int) -> None:
    with SharedFile(tmp_path / "f", TENSORS, {}) as file, pytest.raises(ValueError, match="do not fit b, which has 16"):
        file.write(0, start, bytes(nbytes))


def test_finishing_twice_is_finishing_once(tmp_path: Path) -> None:
    write_all(tmp_path / "f")
    finish(tmp_path / "f")
    before = (tmp_path / "f").stat()
    finish(tmp_path / "f")
    assert (tmp_path / "f").stat() == before


def test_what_was_never_begun_cannot_be_finished(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was never begun, or was discarded"):
        finish(tmp_path / "f")


def test_a_file_that_was_cut_is_not_finished(tmp_path: Path) -> None:
    write_all(tmp_path / "f")
    partial = partial_path(tmp_path / "f")
    os.truncate(partial, partial.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        finish(tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_discarded_file_can_be_begun_anew_with_other_tensors(tmp_path: Path) -> None:
    write_all(tmp_path / "f")
    discard(tmp_path / "f")
    discard(tmp_path / "f")
    SharedFile(tmp_path / "f", TENSORS[:1], {}).close()
    finish(tmp_path / "f")
    assert load_file(tmp_path / "f")["b"].tolist() == [0, 0, 0, 0]


def test_discarding_leaves_a_finished_file(tmp_path: Path) -> None:
    write_all(tmp_path / "f")
    finish(tmp_path / "f")
    discard(tmp_path / "f")
    assert load_file(tmp_path / "f")["b"].equal(B)


def test_a_finished_file_cannot_be_opened_again(tmp_path: Path) -> None:
    write_all(tmp_path / "f")
    finish(tmp_path / "f")
    with pytest.raises(CheckpointError, match="a finished file does not change"):
        SharedFile(tmp_path / "f", TENSORS, {"by": "us"})
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "tensors", [TENSORS[:1], [*TENSORS, ("c", "bool", (1,))], [("b", "float32", (2, 2)), TENSORS[1]]]
)
def test_a_file_of_other_tensors_under_the_name_is_refused_and_kept(tmp_path: Path, tensors: list) -> None:
    write_all(tmp_path / "f")
    before = partial_path(tmp_path / "f").read_bytes()
    with pytest.raises(CheckpointError, match="other tensors or metadata are being written under this name"):
        SharedFile(tmp_path / "f", tensors, {"by": "us"})
    assert partial_path(tmp_path / "f").read_bytes() == before


def test_who_died_anywhere_in_the_header_leaves_a_file_that_others_can_begin(tmp_path: Path) -> None:
    SharedFile(tmp_path / "f", TENSORS, {}).close()
    whole = partial_path(tmp_path / "f").read_bytes()
    for size in range(len(whole) - 48 + 1):
        partial_path(tmp_path / "f").write_bytes(whole[:size])
        SharedFile(tmp_path / "f", TENSORS, {}).close()
        assert partial_path(tmp_path / "f").read_bytes() == whole


def test_writes_that_the_system_cuts_short_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    write_all(tmp_path / "f")
    finish(tmp_path / "f")
    assert load_file(tmp_path / "f")["a"].equal(A)


def test_a_full_disk_is_told_with_the_file_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with SharedFile(tmp_path / "f", TENSORS, {}) as file:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(
            StorageFailed, match=r"/f cannot be written: No space left on device; free space on its disk"
        ):
            file.write(0, 0, bytes(4))


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(StorageFailed, match="/f/g cannot be written: File exists; see that the folder can be written"):
        SharedFile(tmp_path / "f" / "g", TENSORS, {})


@pytest.mark.parametrize("history", [0, 2])
def test_a_file_of_which_some_is_elsewhere_is_not_finished(tmp_path: Path, history: int) -> None:
    path = tmp_path / "f"
    for places in ([0, 2], [1]):
        with pytest.raises(CheckpointError, match=r"not all of it|never begun"):
            finish(path, history, 3)
        with SharedFile(path, TENSORS, {}, history) as file:
            file.mark(places)
    finish(path, history, 3)
    finish(path, history, 3)
    assert path.exists()


def test_what_was_discarded_while_it_was_written_is_not_marked_in_the_next(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with SharedFile(path, TENSORS, {"step": "4"}, 2) as late:
        late.mark([0])
        discard(path, 2, 4)
        again = SharedFile(path, TENSORS, {"step": "4"}, 2)
        with pytest.raises(CheckpointError, match="discarded"):
            late.mark([0])
        again.mark([1])
        again.close()
    with pytest.raises(CheckpointError, match="not all of it"):
        finish(path, 2, 2)


def test_only_what_is_of_the_step_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "f"
    SharedFile(path, TENSORS, {"step": "4"}, 2).close()
    for step, left in ((3, True), (4, False), (4, False)):
        discard(path, 2, step)
        assert partial_path(path, 2).exists() is left
    partial_path(path, 2).write_bytes(b"\1")  # its header did not fit on the disk
    discard(path, 2, 4)
    SharedFile(path, TENSORS, {"step": "5"}, 2).close()
