"""Frames: who owns which, and what is in them."""

from __future__ import annotations

import pytest

from computron._transfer import DevicePool, TransferError


def test_frames_are_allocated_once_and_lowest_first(device):
    pool = device.pool(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    pool.release([1, 3])
    assert pool.allocate(3) == [1, 3, 5]
    assert (pool.frames, pool.free, pool.frame_bytes) == (8, 2, device.frame)


def test_an_exhausted_pool_gives_nothing(device):
    pool = device.pool(4)
    pool.allocate(3)
    with pytest.raises(TransferError, match="2 frames wanted, 1 of 4 free"):
        pool.allocate(2)
    assert pool.free == 1
    assert pool.allocate(0) == []


@pytest.mark.parametrize("frames", [[0, 1, 5], [0, 0], [-1], [99]])
def test_a_double_free_is_an_error_and_frees_nothing(device, frames):
    pool = device.pool(8)
    pool.allocate(4)
    with pytest.raises(TransferError, match="is not allocated"):
        pool.release(frames)
    assert pool.free == 4
    pool.release([0, 1, 2, 3])
    assert pool.free == 8


def test_what_is_written_is_read(device):
    pool = device.pool(3)
    _, frame = pool.allocate(2)
    data = device.bytes(1000)
    pool.write(frame, 300, data)
    pool.write(frame, device.frame - 5, b"close")
    assert pool.read(frame, 300, 1000) == data
    assert pool.read(frame, 350, 10) == data[50:60]
    assert pool.read(frame, device.frame - 5, 5) == b"close"
    assert pool.read(frame, 0, 0) == b""


@pytest.mark.parametrize(("frame", "offset"), [(0, -1), (-1, 0), (3, 0)])
def test_frames_outside_the_pool_are_refused(device, frame, offset):
    pool = device.pool(3)
    with pytest.raises((ValueError, TypeError)):
        pool.read(frame, offset, 1)


def test_bytes_outside_a_frame_are_refused(device):
    pool = device.pool(3)
    with pytest.raises(ValueError, match="outside a frame"):
        pool.read(0, device.frame - 1, 2)
    with pytest.raises(ValueError, match="outside a frame"):
        pool.write(0, device.frame, b"x")
    with pytest.raises(ValueError, match="outside a frame"):
        pool.digest(0, device.frame + 1)


def test_frames_must_be_a_multiple_of_the_granularity(device):
    for frame_bytes in (0, device.backend.granularity - 1, device.backend.granularity + 1):
        with pytest.raises(ValueError, match="smallest frame"):
            DevicePool(device.backend, frame_bytes, 1)
    with pytest.raises(ValueError, match="0 frames"):
        DevicePool(device.backend, device.frame, 0)


def test_a_closed_pool_refuses_everything(device):
    pool = device.pool(4)
    frames = pool.allocate(2)
    pool.close()
    pool.close()
    for use in (lambda: pool.allocate(1), lambda: pool.read(0, 0, 1), lambda: device.range(pool, 1)):
        with pytest.raises(TransferError, match="closed"):
            use()
    pool.release(frames)
    assert pool.free == 4


def test_a_backend_tells_what_it_is(device):
    backend = device.backend
    assert backend.kind == ("host" if device.name == "host" else "cuda")
    assert backend.device_name
    assert backend.device_index == 0
    assert backend.free_memory > 0
    assert backend.failed is None
    assert backend.host_accessible == (not device.is_real)


def test_the_device_holds_no_more_than_it_has(standin_only, monkeypatch):
    device = standin_only
    monkeypatch.setenv("COMPUTRON_STANDIN_MEMORY", str(6 * device.frame))
    assert device.backend.free_memory == 6 * device.frame
    with pytest.raises(TransferError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device.pool(7)
    assert device.backend.free_memory == 6 * device.frame
    device.pool(6)
    assert device.backend.free_memory == 0
