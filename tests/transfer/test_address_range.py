"""Address ranges: frames come and go behind addresses that stay."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys

import pytest

from computron._transfer import TransferError


def test_a_mapped_frame_shows_its_bytes(device):
    if device.is_real:
        pytest.skip("the CPU cannot read a real device; see the tensor tests")
    pool = device.pool(8)
    frames = pool.allocate(3)
    pages = [device.bytes(device.frame) for _ in frames]
    for frame, page in zip(frames, pages, strict=True):
        pool.write(frame, 0, page)
    addresses = device.range(pool, 4)
    addresses.map([3, 0, 1], [frames[0], frames[2], frames[1]])
    assert addresses.mapped() == [frames[2], frames[1], -1, frames[0]]
    assert ctypes.string_at(addresses.address, 2 * device.frame) == pages[2] + pages[1]
    assert ctypes.string_at(addresses.address + 3 * device.frame, device.frame) == pages[0]


def test_a_frame_mapped_in_two_ranges_is_the_same_memory(device):
    if device.is_real:
        pytest.skip("the CPU cannot read a real device; see the tensor tests")
    pool = device.pool(2)
    (frame,) = pool.allocate(1)
    first, second = device.range(pool, 2), device.range(pool, 1)
    first.map([1], [frame])
    second.map([0], [frame])
    ctypes.memmove(first.address + device.frame + 10, b"shared", 6)
    assert ctypes.string_at(second.address + 10, 6) == b"shared"
    assert pool.read(frame, 10, 6) == b"shared"


def test_a_range_is_rounded_up_to_frames(device):
    pool = device.pool(2)
    addresses = device.range(pool, 1)
    assert addresses.nbytes == device.frame
    assert len(addresses.mapped()) == 1


@pytest.mark.parametrize(
    ("slots", "error"), [([0], TransferError), ([-1], ValueError), ([4], ValueError), ([1, 1], ValueError)]
)
def test_a_slot_that_cannot_be_mapped_maps_nothing(device, slots, error):
    pool = device.pool(8)
    frames = pool.allocate(4)
    addresses = device.range(pool, 4)
    addresses.map([0], [frames[0]])
    with pytest.raises(error):
        addresses.map([3, *slots], frames[1 : 2 + len(slots)])
    assert addresses.mapped() == [frames[0], -1, -1, -1]


def test_only_allocated_frames_are_mapped(device):
    pool = device.pool(4)
    addresses = device.range(pool, 2)
    with pytest.raises(TransferError, match="not allocated"):
        addresses.map([0], [1])
    with pytest.raises(ValueError, match="as many slots as frames"):
        addresses.map([0, 1], [1])


def test_unmapped_slots_can_be_mapped_again(device):
    pool = device.pool(8)
    frames = pool.allocate(6)
    addresses = device.range(pool, 6)
    addresses.map(range(6), frames)
    addresses.unmap([4, 0, 1])
    assert addresses.mapped() == [-1, -1, frames[2], frames[3], -1, frames[5]]
    with pytest.raises(TransferError, match="slot 1 is not mapped"):
        addresses.unmap([2, 1])
    assert addresses.mapped()[2] == frames[2]
    addresses.map([0, 4, 1], [frames[5], frames[5], frames[0]])
    assert addresses.mapped() == [frames[5], frames[0], frames[2], frames[3], frames[5], frames[5]]


def test_a_closed_range_unmaps_and_refuses(device):
    pool = device.pool(2)
    frames = pool.allocate(2)
    addresses = device.range(pool, 2)
    addresses.map([0, 1], frames)
    addresses.close()
    addresses.close()
    assert addresses.mapped() == [-1, -1]
    with pytest.raises(TransferError, match="closed"):
        addresses.map([0], frames[:1])


def test_a_torch_tensor_sees_what_is_mapped_and_keeps_the_range(device):
    torch = pytest.importorskip("torch")
    pool = device.pool(4)
    frames = pool.allocate(3)
    pages = [device.bytes(device.frame) for _ in frames]
    for frame, page in zip(frames, pages, strict=True):
        pool.write(frame, 0, page)
    addresses = device.range(pool, 3)
    addresses.map([0, 1, 2], frames)
    tensor = torch.from_dlpack(addresses.dlpack())
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3 * device.frame,)
    assert tensor.data_ptr() == addresses.address
    assert tensor.device.type == ("cpu" if device.backend.host_accessible else "cuda")
    view = tensor[device.frame : device.frame + 4096].view(torch.bfloat16)
    assert view.shape == (2048,)
    assert tensor.cpu().numpy().tobytes() == b"".join(pages)

    addresses.unmap([1])
    addresses.map([1], [frames[0]])
    assert tensor.cpu().numpy().tobytes() == pages[0] + pages[0] + pages[2]
    del addresses, view
    gc.collect()
    assert tensor.cpu()[:16].numpy().tobytes() == pages[0][:16]


def test_an_unused_capsule_keeps_nothing(device):
    pool = device.pool(1)
    addresses = device.range(pool, 1)
    capsule = addresses.dlpack()
    assert type(capsule).__name__ == "PyCapsule"
    del capsule


def test_reading_an_unmapped_slot_is_a_fault(host_only):
    program = """
import ctypes
from computron import _transfer
backend = _transfer.host_backend()
addresses = _transfer.AddressRange(_transfer.DevicePool(backend, 65536, 1), 65536)
print("before", flush=True)
ctypes.string_at(addresses.address, 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "before" in done.stdout, done.stderr
    assert done.returncode != 0


def test_a_map_that_fails_maps_nothing(device):
    device.demand_faults()
    pool = device.pool(8)
    frames = pool.allocate(6)
    addresses = device.range(pool, 8)
    device.backend.inject_fault("map", 2, "no more page tables")
    with pytest.raises(TransferError, match="no more page tables"):
        addresses.map([0, 2, 4, 6], [frames[0], frames[2], frames[4], frames[1]])
    assert addresses.mapped() == [-1] * 8
    addresses.map([0, 2, 4, 6], [frames[0], frames[2], frames[4], frames[1]])
    assert addresses.mapped() == [frames[0], -1, frames[2], -1, frames[4], -1, frames[1], -1]
