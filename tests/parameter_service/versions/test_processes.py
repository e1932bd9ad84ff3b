"""Several real processes write one file at once, and some of them die."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from computron.errors import CheckpointError
from computron.parameter_service.versions.files import SharedFile, finish, partial_path
from computron.parameter_service.versions.header import Tensor

FORK = multiprocessing.get_context("fork")
WRITERS = 6
PIECE = 5000  # elements
TENSORS: list[Tensor] = [(f"layer.{n}", "float32", (WRITERS, PIECE)) for n in range(20)]
METADATA = {"job": "lm", "step": "7"}


def values(tensor: int, writer: int) -> np.ndarray:
    return np.arange(PIECE, dtype=np.float32) + 1000 * tensor + writer


def write_own(path: Path, writer: int, barrier: Barrier) -> None:
    barrier.wait()
    with SharedFile(path, TENSORS, METADATA) as file:
        for tensor in range(len(TENSORS)):
            file.write(tensor, writer * PIECE, values(tensor, writer).data)
        file.sync()


def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def write_together(path: Path) -> None:
    barrier = FORK.Barrier(WRITERS)
    processes = [start(write_own, path, writer, barrier) for writer in range(WRITERS)]
    for process in processes:
        process.join()
        assert process.exitcode == 0


def assert_complete(path: Path) -> None:
    loaded = load_file(path)
    assert loaded.keys() == {name for name, _, _ in TENSORS}
    for tensor, (name, _, _) in enumerate(TENSORS):
        assert (loaded[name] == np.stack([values(tensor, writer) for writer in range(WRITERS)])).all()


def test_processes_that_begin_at_once_write_one_file(tmp_path: Path) -> None:
    for attempt in range(5):
        path = tmp_path / f"{attempt}.safetensors"
        write_together(path)
        finish(path)
        assert_complete(path)
    assert len(os.listdir(tmp_path)) == 5


def write_and_hang(path: Path, says: object) -> None:
    file = SharedFile(path, TENSORS, METADATA)
    file.write(3, 0, np.full(PIECE, np.nan, np.float32).data)
    says.set()  # type: ignore[attr-defined]
    signal.pause()


def hold_lock_and_hang(path: Path, says: object) -> None:
    def hang(*_: object) -> None:
        says.set()  # type: ignore[attr-defined]
        signal.pause()

    os.ftruncate = hang
    SharedFile(path, TENSORS, METADATA)


@pytest.mark.parametrize("target", [write_and_hang, hold_lock_and_hang])
def test_who_is_killed_leaves_only_an_unfinished_file_that_others_complete(
    tmp_path: Path, target: Callable[..., None]
) -> None:
    path = tmp_path / "f.safetensors"
    says = FORK.Event()
    process = start(target, path, says)
    assert says.wait(20)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [partial_path(path).name]
    write_together(path)
    finish(path)
    assert_complete(path)


def finish_it(path: Path, barrier: Barrier) -> None:
    barrier.wait()
    finish(path)


def open_late(path: Path, barrier: Barrier) -> None:
    barrier.wait()
    with suppress(CheckpointError):  # the file may be finished already, or not yet
        SharedFile(path, TENSORS, METADATA).close()


def test_finishing_and_opening_at_once_end_with_the_one_finished_file(tmp_path: Path) -> None:
    write_together(tmp_path / "whole")
    content = partial_path(tmp_path / "whole").read_bytes()
    for attempt in range(10):
        path = tmp_path / str(attempt) / "f.safetensors"
        path.parent.mkdir()
        partial_path(path).write_bytes(content)
        barrier = FORK.Barrier(4)
        processes = [start(target, path, barrier) for target in (finish_it, open_late) * 2]
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert os.listdir(path.parent) == [path.name]
        assert path.read_bytes() == content
