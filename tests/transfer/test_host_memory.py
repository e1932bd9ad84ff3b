"""Host memory for pages: reserved at once, committed slab by slab."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest

from computron._transfer import HostMemory, Source, TransferError


def test_memory_is_committed_in_whole_slabs_and_once(device):
    slab = 4 * device.frame
    memory = HostMemory(device.backend, 10 * device.frame, slab_bytes=slab)
    assert (memory.nbytes, memory.committed) == (10 * device.frame, 0)
    memory.commit(slab + 1, 1)
    assert memory.committed == slab
    memory.commit(slab, device.frame, threads=4)
    assert memory.committed == slab
    memory.commit(0, memory.nbytes, threads=3)
    assert memory.committed == memory.nbytes
    memory.close()


def test_buffers_are_writable_windows_that_keep_the_memory(device):
    memory = HostMemory(device.backend, 2 * device.frame)
    memory.commit(0, memory.nbytes)
    whole, part = memory.buffer(0, memory.nbytes), memory.buffer(device.frame, 16)
    assert not whole.readonly
    assert part.nbytes == 16
    assert bytes(whole) == bytes(memory.nbytes)
    whole[device.frame : device.frame + 4] = b"data"
    memory.close()
    with pytest.raises(TransferError, match="closed"):
        memory.buffer(0, 1)
    del whole
    gc.collect()
    assert bytes(part[:5]) == b"data\0"


def test_bytes_outside_the_memory_are_refused(device):
    memory = HostMemory(device.backend, device.frame)
    for use in (memory.commit, memory.discard, memory.buffer):
        with pytest.raises(ValueError, match="outside a host memory"):
            use(device.frame - 1, 2)
    with pytest.raises(ValueError, match="0 bytes"):
        HostMemory(device.backend, 0)
    memory.close()


def test_discarded_pages_go_back_to_the_system_and_read_as_zeros(host_only):
    device = host_only
    pages = 64
    memory = device.memory(pages)
    before = resident_bytes()
    memory.discard(0, (pages // 2) * device.frame)
    assert resident_bytes() <= before - (pages // 2 - 2) * device.frame
    assert device.page(memory, 0) == bytes(device.frame)
    assert device.page(memory, pages - 1) != bytes(device.frame)


def test_a_discard_of_pinned_memory_keeps_it_usable(device):
    pool, memory = device.pool(1), device.memory(1)
    engine = device.engine(pool)
    memory.discard(0, device.frame)
    (frame,) = pool.allocate(1)
    assert device.send(engine, memory, [frame]).wait()
    assert pool.read(frame, 0, device.frame) == device.page(memory, 0)


def test_uncommitted_memory_is_no_source(device):
    pool = device.pool(2)
    engine = device.engine(pool)
    memory = HostMemory(device.backend, 4 * device.frame, slab_bytes=2 * device.frame)
    memory.commit(0, 1)
    frames = pool.allocate(1)
    for address in (memory.address + 2 * device.frame, memory.address - 1, memory.address + device.frame + 1, 4096):
        with pytest.raises(TransferError, match="not inside one committed slab"):
            engine.submit(frames, [Source.pinned(address)], [device.frame], [1])
    pool.release(frames)
    assert pool.free == 2
    memory.close()


def test_memory_of_another_backend_is_no_source(device):
    pool = device.pool(1)
    engine = device.engine(pool)
    other = device.make_backend()
    memory = HostMemory(other, device.frame)
    memory.commit(0, 1)
    with pytest.raises(TransferError, match="of this backend"):
        engine.submit(pool.allocate(1), [Source.pinned(memory.address)], [device.frame], [1])
    memory.close()


def test_closing_during_a_transfer_waits_for_it(device):
    device.slow_down(0.01)
    pool, memory = device.pool(8), device.memory(8)
    engine = device.engine(pool)
    frames = pool.allocate(8)
    expected = [device.page(memory, page) for page in range(8)]
    transfer = device.send(engine, memory, frames)
    memory.close()
    transfer.wait()
    assert [pool.read(frame, 0, device.frame) for frame in frames] == expected


def test_a_node_that_does_not_exist_is_an_error(device):
    memory = HostMemory(device.backend, device.frame, numa_node=1023)
    with pytest.raises(TransferError, match="NUMA node"):
        memory.commit(0, 1)
    assert memory.committed == 0
    memory.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
