"""Memory that processes share: segments, which are files in memory, and windows, in which segments are mapped side by
side.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
_MADV_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
HUGE_PAGE = 2 << 20  # bytes
SIZE_STAYS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """A file in memory without a name, mapped here. It lives as long as a process has it open or mapped.

    Its size is sealed: whoever maps it is killed by SIGBUS where another process has cut it short.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes over `fd`. Raises ValueError if the file is smaller than `nbytes`, or its size can change."""
        self.fd = fd
        self.nbytes = nbytes
        try:
            _check(fd, nbytes)
            self._window = Window(nbytes)
            self._window.map(0, fd, self._window.nbytes)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, name: str, nbytes: int) -> Segment:
        """Zeroes. name: what /proc calls it. Raises OSError."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_STAYS)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, nbytes)

    def view(self) -> memoryview:
        """Its bytes. They stay mapped while this or a tensor made of it lives, also after `close`."""
        return self._window.view(0, self.nbytes)

    def tensor(self, dtype: torch.dtype, offset: int, elements: int) -> torch.Tensor:
        """A part of it; offset: in bytes."""
        return self._window.tensor(offset, elements, dtype)

    def touch(self) -> None:
        """Map all its pages now, rather than each when it is used first. Linux before 5.14 ignores this."""
        self._window.advise(0, self._window.nbytes, _MADV_POPULATE_WRITE)

    def enlarge(self, offset: int) -> bool:
        """Make one huge page of the HUGE_PAGE bytes from `offset` on, a multiple of it; False where the machine cannot.
        They stay what they are, and are used meanwhile.
        """
        self._window.advise(offset, mmap.PAGESIZE, _MADV_POPULATE_READ)  # where there is no page, none can grow
        return self._window.advise(offset, HUGE_PAGE, _MADV_COLLAPSE)

    def close(self) -> None:
        """Close the file; its memory is given back when nothing views it any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def _check(fd: int, nbytes: int) -> None:
    size = os.fstat(fd).st_size
    if size < nbytes:
        raise ValueError(f"a segment of {size} bytes where {nbytes} are needed")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError(f"what came is no file in memory: {error.strerror}") from error
    if seals & SIZE_STAYS != SIZE_STAYS:
        raise ValueError("a segment whose size is not sealed")


class Window:
    """A range of addresses of this process. What is mapped there changes, the addresses do not. It begins where a huge
    page may, if one fits.
    """

    def __init__(self, nbytes: int) -> None:
        """Raises OSError if there are no addresses left. A page that nothing is mapped to must not be touched."""
        self.nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.address = _reserve(self.nbytes)
        # Whatever torch makes of these bytes keeps them alive, and they the window.
        kind: Any = type("WindowBytes", (ctypes.c_char * self.nbytes,), {})
        self._bytes = kind.from_address(self.address)
        self._bytes.mapping = _Mapping(self.address, self.nbytes)

    def map(self, offset: int, fd: int, nbytes: int, file_offset: int = 0) -> None:
        """Show this part of a segment's file at `offset`. All are multiples of the page size; raises OSError."""
        self._check(offset, nbytes)
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _map(self.address + offset, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, file_offset)
        if nbytes >= HUGE_PAGE:
            self.advise(offset, nbytes, _MADV_HUGEPAGE)  # at once, where the machine gives them to files in memory

    def advise(self, offset: int, nbytes: int, advice: int) -> bool:
        """madvise; False if the machine does not take it."""
        return bool(_libc.madvise(self.address + offset, nbytes, advice) == 0)

    def tensor(self, offset: int, elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Elements from byte `offset` on. The window's addresses stay reserved as long as it lives."""
        return torch.frombuffer(self._bytes, dtype=dtype, count=elements, offset=offset)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._bytes).cast("B")[offset : offset + nbytes]

    def _check(self, offset: int, nbytes: int) -> None:
        if offset % mmap.PAGESIZE or nbytes % mmap.PAGESIZE or not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are no pages of a window of {self.nbytes} bytes")


class _Mapping:
    """Gives the addresses back when it dies."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._range = (address, nbytes)

    def __del__(self) -> None:
        _libc.munmap(*self._range)


def _reserve(nbytes: int) -> int:
    """Addresses of which none is mapped. Raises OSError."""
    room = nbytes + HUGE_PAGE - mmap.PAGESIZE if nbytes >= HUGE_PAGE else nbytes
    start = _map(None, room, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    first = -(-start // HUGE_PAGE) * HUGE_PAGE if nbytes >= HUGE_PAGE else start
    for begin, end in ((start, first), (first + nbytes, start + room)):
        if begin < end:
            _libc.munmap(begin, end - begin)
    return first


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    found = _libc.mmap(address, nbytes, protection, flags, fd, offset)
    if found == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {nbytes} bytes of memory: {os.strerror(code)}")
    return int(found)
