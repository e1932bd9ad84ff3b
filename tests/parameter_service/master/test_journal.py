"""The log: what was written is read again, whatever part of it had reached the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from computron.parameter_service.master.journal import Journal, LogUnusable
from computron.parameter_service.master.records import (
    AggregatorGone,
    AggregatorKnown,
    AggregatorStarted,
    Book,
    CountSet,
    EpochBegun,
    JobCreated,
    JobDropped,
    JobFailed,
    JobUnhosted,
    MemberGone,
    MoveBegun,
    MoveEnded,
    Placed,
    QuotaSet,
    Record,
    RolledBack,
    SavingFailed,
    SnapshotBad,
    SnapshotSaved,
    VersionSaved,
)
from tests.parameter_service.master.fakes import address_of, job_spec

HISTORY: list[Record] = [
    AggregatorStarted("one", 7, 123.0),
    AggregatorKnown(address_of("one"), 7),
    AggregatorKnown(address_of("two"), 8),
    CountSet(2),
    QuotaSet("lm", 10**9),
    JobCreated(job_spec("lm"), "secret"),
    EpochBegun("lm", 1),
    Placed("lm", 1, ((0, "a"), (1, "b")), ("one",) * 4, 0, initialise=0),
    SnapshotSaved("lm", 10, "/s/10"),
    MoveBegun("lm", (1, 2), "two"),
    MoveEnded("lm", (1,), "two"),
    MemberGone("lm", 1, False),
    EpochBegun("lm", 2),
    SnapshotSaved("lm", 20, "/s/20"),
    Placed("lm", 2, ((0, "a"),), ("one", "two", "one", "one"), 17, lost=3, reason="rank 1 left"),
    VersionSaved("lm", "v1", 18, "/v/v1", 1e9),
    SnapshotSaved("lm", 30, "/s/30"),
    SnapshotBad("lm", "/s/20"),
    SavingFailed("lm"),
    MoveBegun("lm", (0,), "two"),
    MemberGone("lm", 0, True),
    JobCreated(job_spec("other"), "another"),
    JobFailed("other", "no snapshot"),
    JobUnhosted("lm"),
    QuotaSet("lm", None),
    JobDropped("other"),
    AggregatorGone("one"),
    EpochBegun("lm", 9),
    JobDropped("lm"),
    JobCreated(job_spec("lm"), "secret", 9),
]


def book_of(records: list[Record]) -> Book:
    book = Book()
    for record in records:
        book.apply(record)
    return book


def contents(book: Book) -> list[object]:
    return [book.jobs, book.started, book.known, book.minimum, book.quotas, book.dropped]


@pytest.mark.parametrize("length", range(len(HISTORY) + 1))
def test_a_book_is_read_again_as_it_was_after_every_record(tmp_path: Path, length: int) -> None:
    journal = Journal(tmp_path / "log")
    for record in HISTORY[:length]:
        journal.append(record)
    journal.close()
    for _ in range(2):  # the second time from the shortened log
        again = Journal(tmp_path / "log")
        again.close()
        assert contents(again.book) == contents(book_of(HISTORY[:length]))


def test_totals_outlive_the_shortening_of_the_log(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log")
    for record in HISTORY[:15]:
        journal.append(record)
    journal.close()
    Journal(tmp_path / "log").close()
    again = Journal(tmp_path / "log")
    again.close()
    assert (again.book.jobs["lm"].lost, again.book.jobs["lm"].moves) == (3, 1)


@pytest.mark.parametrize("torn", [1, 10, 40])
def test_a_record_that_was_being_written_is_cut_off(
    tmp_path: Path, torn: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    journal = Journal(path)
    for record in HISTORY[:9]:
        journal.append(record)
    journal.close()
    path.write_bytes(path.read_bytes()[:-torn])
    again = Journal(path)
    again.close()
    assert contents(again.book) == contents(book_of(HISTORY[:8]))
    assert "the last record was not complete" in caplog.text


def test_a_damaged_log_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"type":"count_set","minimum":2}\n{"type":"nonsense"}\n{"type":"count_set","minimum":1}\n')
    with pytest.raises(LogUnusable, match="line 2"):
        Journal(path)
    path.unlink()
    Journal(path).close()  # the lock was given back


def test_two_masters_cannot_use_one_log(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log")
    with pytest.raises(LogUnusable, match="another master"):
        Journal(tmp_path / "log")
    journal.close()
    Journal(tmp_path / "log").close()


def test_nobody_else_can_read_the_tokens(tmp_path: Path) -> None:
    Journal(tmp_path / "log").close()
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_nothing_is_written_behind_half_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    journal = Journal(path)
    journal.append(CountSet(1))
    fill_up(monkeypatch)
    with pytest.raises(LogUnusable, match="No space left on device"):
        journal.append(CountSet(2))
    monkeypatch.undo()
    for again in (lambda: journal.append(CountSet(3)), journal.sync):
        with pytest.raises(LogUnusable, match="No space left on device"):
            again()
    journal.close()
    read = Journal(path)
    read.close()
    assert read.book.minimum == 1


def test_a_log_that_grows_is_written_anew_while_it_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("computron.parameter_service.master.journal.LARGEST", 2000)
    path = tmp_path / "log"
    journal = Journal(path)
    for count in range(1000):
        record = CountSet(count)
        journal.book.apply(record)
        journal.append(record)
        journal.shorten()
        assert path.stat().st_size < 2100
    journal.close()
    again = Journal(path)
    again.close()
    assert again.book.minimum == 999


def test_rollbacks_are_kept_as_long_as_they_void_anything() -> None:
    book = Book()
    book.apply(JobCreated(job_spec("lm"), "secret"))
    for epoch, applied in ((2, 50), (3, 70), (4, 60), (6, 60)):
        book.apply(RolledBack("lm", epoch, applied))
    job = book.jobs["lm"]
    assert job.rollbacks == [RolledBack("lm", 2, 50), RolledBack("lm", 6, 60)]
    assert [job.counts(*saved) for saved in ((50, 1), (55, 1), (60, 2), (65, 3), (65, 6))] == [
        True, False, True, False, True
    ]  # fmt: skip


def fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room for ten bytes."""
    write, room = os.write, [10]

    def nearly_full(file: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: room.pop()])

    monkeypatch.setattr("computron.parameter_service.master.journal.os.write", nearly_full)
