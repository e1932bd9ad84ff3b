"""The master's log on disk: one JSON record a line, appended, and on the disk before anybody acts on it."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from computron.errors import ComputronError
from computron.parameter_service.master.records import Book, Record

log = logging.getLogger(__name__)

MODE = 0o600  # it holds the jobs' tokens
LARGEST = 8 << 20  # bytes that the log may have, or twice what it needs, before it is written anew


class LogUnusable(ComputronError):
    """The log is in use, or it is damaged, or it cannot be written. The message says what to do."""

    code = "log_unusable"


class Journal:
    """Locked against a second master for as long as it is open.

    An error is final: what comes behind half a record could not be read again, and nobody may act on what is not there.
    """

    def __init__(self, path: Path) -> None:
        """Reads the log into `book`, and writes it anew as short as it can be.

        A line that was being written when the last master died, the last one without its end, is cut off.
        Raises LogUnusable.
        """
        self.path = path
        self._encode = msgspec.json.Encoder().encode
        self._dirty = False
        self._size = 0
        self._broken: LogUnusable | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path)
            try:
                self.book = _read(path)
                self._compact()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise LogUnusable(f"{path}: {error.strerror}; give another file with --log") from error

    def append(self, record: Record) -> None:
        """Raises LogUnusable, and does so ever after."""
        line = self._encode(record) + b"\n"
        with self._whole():
            _write(self._file, line)
        self._size += len(line)
        self._dirty = True

    def sync(self) -> None:
        """What was appended outlasts a loss of power. Raises as `append` does."""
        with self._whole():
            if self._dirty:
                os.fdatasync(self._file)
        self._dirty = False

    def shorten(self) -> None:
        """Write the log anew if it has become too long. To be called when all that `book` has is in it. Raises as
        `append` does.
        """
        if self._size > self._longest:
            with self._whole():
                before = self._file
                self._compact()
                os.close(before)

    def close(self) -> None:
        """Raises LogUnusable if what was appended last may be lost."""
        try:
            if self._broken is None:
                self.sync()
        finally:
            os.close(self._file)
            os.close(self._lock)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        if self._broken is not None:
            raise self._broken
        try:
            yield
        except OSError as error:
            text = f"{self.path} cannot be written: {error.strerror}; the master ends: start it again when it can"
            self._broken = LogUnusable(text)
            raise self._broken from error

    def _compact(self) -> None:
        fresh = self.path.with_name(f"{self.path.name}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, MODE)
        try:
            size = 0
            for record in self.book.records():
                line = self._encode(record) + b"\n"
                _write(descriptor, line)
                size += len(line)
            os.fsync(descriptor)
            os.replace(fresh, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(descriptor)
            raise
        self._file, self._size, self._longest, self._dirty = descriptor, size, max(LARGEST, 2 * size), False


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _locked(path: Path) -> int:
    """The lock is a file of its own, because the log is replaced when it is written anew."""
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LogUnusable(f"{path}: another master uses this log; stop it, or give another file with --log") from None
    return descriptor


def _read(path: Path) -> Book:
    book = Book()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return book
    decoder = msgspec.json.Decoder(Record)
    lines = content.split(b"\n")
    if lines.pop():
        log.warning("log_torn path=%s: the last record was not complete and is left out", path)
    for number, line in enumerate(lines, 1):
        try:
            book.apply(decoder.decode(line))
        except (msgspec.MsgspecError, KeyError, IndexError) as error:
            raise LogUnusable(
                f"{path}, line {number}: {error}; the log is damaged: move it away to begin anew"
            ) from None
    return book
