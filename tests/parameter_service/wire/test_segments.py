from __future__ import annotations

import fcntl
import gc
import os
from pathlib import Path

import pytest
import torch

from computron.parameter_service.wire.segments import HUGE_PAGE, Segment, Window

PAGE = 4096


def mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps]
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_segments_are_seen_through_windows_side_by_side() -> None:
    first, second = Segment.create("first", PAGE), Segment.create("second", 3 * PAGE)
    window = Window(4 * PAGE)
    window.map(0, first.fd, PAGE)
    window.map(PAGE, second.fd, 2 * PAGE, PAGE)
    whole = window.tensor(0, 3 * PAGE // 4)
    whole.copy_(torch.arange(whole.numel()))
    assert torch.equal(first.tensor(torch.float32, 0, 1024), torch.arange(1024.0))
    assert torch.equal(second.tensor(torch.float32, PAGE, 2048), torch.arange(1024.0, 3072.0))
    assert second.tensor(torch.float32, 0, 1024).count_nonzero() == 0
    first.close()
    second.close()
    whole[0] = 7  # what is mapped outlives its file
    assert window.view(0, 4).cast("f")[0] == 7


def test_addresses_are_given_back_with_the_last_tensor() -> None:
    segment, window = Segment.create("segment", PAGE), Window(PAGE)
    window.map(0, segment.fd, PAGE)
    address, tensor = window.address, window.tensor(0, 4)
    del window
    gc.collect()
    tensor.fill_(1)
    assert mapped(address)
    del tensor
    gc.collect()
    assert not mapped(address)


def test_what_is_no_page_of_a_window_is_refused() -> None:
    segment, window = Segment.create("segment", 2 * PAGE), Window(2 * PAGE)
    for offset, nbytes in ((1, PAGE), (0, 100), (PAGE, 2 * PAGE), (-PAGE, PAGE)):
        with pytest.raises(ValueError, match="are no pages"):
            window.map(offset, segment.fd, nbytes)
    with pytest.raises(OSError, match="cannot map"):
        window.map(0, -1, PAGE)


def test_a_file_that_is_too_small_is_refused() -> None:
    segment = Segment.create("small", 100)
    fd = os.dup(segment.fd)
    with pytest.raises(ValueError, match="100 bytes where 200 are needed"):
        Segment(fd, 200)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    segment.close()


def test_nobody_can_cut_a_segment_short_once_it_is_mapped_elsewhere() -> None:
    segment = Segment.create("segment", PAGE)
    other = Segment(os.dup(segment.fd), PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)
    assert other.tensor(torch.float32, 0, 1024).count_nonzero() == 0
    segment.close()
    other.close()


def test_a_file_whose_size_can_change_is_refused(tmp_path: Path) -> None:
    bare = os.memfd_create("bare", os.MFD_ALLOW_SEALING)
    os.ftruncate(bare, PAGE)
    fcntl.fcntl(bare, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, PAGE)
    for fd, said in ((bare, "is not sealed"), (file, "no file in memory")):
        with pytest.raises(ValueError, match=said):
            Segment(fd, PAGE)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def huge_bytes(address: int) -> int:
    """Bytes of a mapping that huge pages hold."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    inside = False
    for line in lines:
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            inside = int(first.split("-")[0], 16) == address
        elif inside and first == "ShmemPmdMapped:":
            return int(line.split()[1]) << 10
    raise AssertionError("nothing is mapped there")


def test_pages_become_huge_and_keep_their_contents() -> None:
    segment = Segment.create("large", 2 * HUGE_PAGE + PAGE)
    values = segment.tensor(torch.float32, 0, segment.nbytes // 4)
    values[: HUGE_PAGE // 8] = torch.arange(HUGE_PAGE // 8)
    assert values.data_ptr() % HUGE_PAGE == 0
    huge = [segment.enlarge(offset) for offset in (0, HUGE_PAGE)]
    if all(huge):
        assert huge_bytes(values.data_ptr()) == 2 * HUGE_PAGE
    else:
        pytest.skip("this machine makes no huge pages of files in memory")
    assert torch.equal(values[: HUGE_PAGE // 8], torch.arange(HUGE_PAGE // 8).float())
    assert not values[HUGE_PAGE // 8 :].any()
    assert not segment.enlarge(2 * HUGE_PAGE)
    segment.close()


def test_a_large_window_reserves_no_more_than_its_size() -> None:
    with open("/proc/self/statm") as statm:
        before = int(statm.read().split()[0])
    window = Window(8 * HUGE_PAGE)
    with open("/proc/self/statm") as statm:
        assert int(statm.read().split()[0]) - before < 9 * HUGE_PAGE // PAGE
    assert window.address % HUGE_PAGE == 0
