"""Pageable memory and files: through the staging ring."""

from __future__ import annotations

import os

import numpy as np
import pytest

from computron._transfer import HostMemory, Source, TransferError


def read_all(device, pool, frames):
    return b"".join(pool.read(frame, 0, device.frame) for frame in frames)


@pytest.fixture
def opened(tmp_path):
    descriptors = []

    def open_file(data: bytes) -> int:
        path = tmp_path / f"file{len(descriptors)}"
        path.write_bytes(data)
        descriptors.append(os.open(path, os.O_RDONLY))
        return descriptors[-1]

    yield open_file
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("staging_chunks", [1, 2, 5])
def test_pageable_memory_arrives(device, staging_chunks):
    pool = device.pool(6)
    data = np.frombuffer(device.bytes(6 * device.frame), np.uint8)
    address = data.ctypes.data
    frames = pool.allocate(6)
    sources = [Source.pageable(address + page * device.frame) for page in range(6)]
    engine = device.engine(pool, staging_chunks=staging_chunks)
    engine.submit(frames, sources, [device.frame] * 6, [6]).wait()
    assert read_all(device, pool, frames) == data.tobytes()


def test_files_arrive_and_gaps_are_zeros(device, opened):
    pool = device.pool(2)
    first, second = opened(device.bytes(device.frame)), opened(device.bytes(device.frame))
    size = device.frame
    extents = [
        (size // 2 + 7, 1001, second, 3),
        (5, size // 2, first, 11),
        (size - 10, 10, first, 0),
    ]
    frames = pool.allocate(2)
    for frame in frames:
        pool.write(frame, 0, device.bytes(size))
    device.engine(pool).submit(frames, [Source.file(extents), Source.file([])], [size, size - 1], [2]).wait()
    expected = bytearray(size)
    for offset, nbytes, descriptor, position in extents:
        expected[offset : offset + nbytes] = os.pread(descriptor, nbytes, position)
    assert pool.read(frames[0], 0, size) == bytes(expected)
    assert pool.read(frames[1], 0, size - 1) == bytes(size - 1)


def test_extents_must_not_overlap(device):
    with pytest.raises(ValueError, match="overlap"):
        Source.file([(0, 10, 0, 0), (9, 5, 0, 0)])


def test_a_kept_page_stays_in_host_memory(device, opened):
    pool, memory = device.pool(4), device.memory(3)
    data = device.bytes(4 * device.frame)
    descriptor = opened(data)
    frames = pool.allocate(4)
    sources = [
        Source.file(
            [(0, device.frame, descriptor, page * device.frame)],
            keep=memory.address + page * device.frame if page < 3 else 0,
        )
        for page in range(4)
    ]
    transfer = device.engine(pool, staging_chunks=2).submit(frames, sources, [device.frame] * 4, [4])
    transfer.wait()
    assert transfer.state == "done"
    assert read_all(device, pool, frames) == data
    assert bytes(memory.buffer(0, memory.nbytes)) == data[: memory.nbytes]


def test_a_place_to_keep_a_page_must_be_committed(device, opened):
    pool = device.pool(1)
    memory = HostMemory(device.backend, device.frame)
    source = Source.file([(0, 1, opened(b"x"), 0)], keep=memory.address)
    with pytest.raises(TransferError, match="not inside one committed slab"):
        device.engine(pool).submit(pool.allocate(1), [source], [device.frame], [1])
    memory.close()


def test_all_kinds_of_sources_in_one_transfer(device, opened):
    pool, memory = device.pool(9), device.memory(9)
    pageable = np.frombuffer(device.bytes(9 * device.frame), np.uint8)
    in_file = device.bytes(9 * device.frame)
    descriptor = opened(in_file)
    sources, expected = [], []
    for page in range(9):
        start, end = page * device.frame, (page + 1) * device.frame
        if page % 3 == 0:
            sources.append(Source.pinned(memory.address + start))
            expected.append(device.page(memory, page))
        elif page % 3 == 1:
            sources.append(Source.pageable(pageable.ctypes.data + start))
            expected.append(pageable[start:end].tobytes())
        else:
            sources.append(Source.file([(0, device.frame, descriptor, start)]))
            expected.append(in_file[start:end])
    frames = pool.allocate(9)
    device.engine(pool, staging_chunks=3).submit(frames, sources, [device.frame] * 9, [3, 3, 3]).wait()
    assert read_all(device, pool, frames) == b"".join(expected)


def test_a_file_that_ends_early_fails_its_transfer(device, opened):
    pool = device.pool(4)
    engine = device.engine(pool, staging_chunks=2)
    short = opened(device.bytes(device.frame // 2))
    frames = pool.allocate(2)
    transfer = engine.submit(
        frames,
        [Source.file([(0, device.frame // 2, short, 0)]), Source.file([(0, device.frame, short, 0)])],
        [device.frame] * 2,
        [1, 1],
    )
    transfer.wait()
    assert transfer.state == "failed"
    assert "a file ended at byte" in transfer.error
    pool.release(frames)
    assert pool.free == 4
    assert device.backend.failed is None


def test_a_descriptor_that_is_not_open_fails_its_transfer(device):
    pool = device.pool(1)
    transfer = device.engine(pool).submit(pool.allocate(1), [Source.file([(0, 10, 987654, 0)])], [device.frame], [1])
    transfer.wait()
    assert transfer.state == "failed"
    assert "Bad file descriptor" in transfer.error


def test_an_urgent_file_takes_the_staging_chunks_of_a_waiting_one(device, opened):
    device.slow_down(0.005)
    pool, memory = device.pool(18), device.memory(10)
    data = device.bytes(4 * device.frame)
    descriptor = opened(data)
    engine = device.engine(pool, depth=1, staging_chunks=2)

    def from_file(priority):
        sources = [Source.file([(0, device.frame, descriptor, page * device.frame)]) for page in range(4)]
        return engine.submit(pool.allocate(4), sources, [device.frame] * 4, [4], priority=priority)

    straight = device.send(engine, memory, pool.allocate(10), priority=1)
    waiting = from_file(priority=2)  # fills both chunks, and cannot send them
    urgent = from_file(priority=0)
    order = []
    names = {straight.id: "straight", waiting.id: "waiting", urgent.id: "urgent"}
    while len(order) < 3:
        order += [names[ended.id] for ended in engine.completions()]
    assert order == ["urgent", "straight", "waiting"]
    assert read_all(device, pool, range(10, 14)) == data, "what was dropped is read again"
    assert read_all(device, pool, range(14, 18)) == data


def test_cancelling_returns_the_staging_chunks(device, opened):
    device.slow_down(0.005)
    pool = device.pool(8)
    descriptor = opened(device.bytes(8 * device.frame))
    engine = device.engine(pool, depth=1, staging_chunks=2)
    sources = [Source.file([(0, device.frame, descriptor, page * device.frame)]) for page in range(4)]
    for _ in range(5):
        frames = pool.allocate(4)
        transfer = engine.submit(frames, sources, [device.frame] * 4, [4])
        while transfer.bytes_done == 0:
            pass
        transfer.cancel()
        transfer.wait()
        pool.release(frames)
    frames = pool.allocate(4)
    last = engine.submit(frames, sources, [device.frame] * 4, [4])
    last.wait()
    assert last.state == "done"
    assert read_all(device, pool, frames) == os.pread(descriptor, 4 * device.frame, 0)


def test_the_stand_in_never_sees_pageable_memory_in_a_transfer(standin_only, opened):
    device = standin_only
    pool, memory = device.pool(4), device.memory(2)
    data = device.bytes(2 * device.frame)
    descriptor = opened(data)
    before = device.standin.count("pageable_copies")
    device.engine(pool).submit(
        pool.allocate(4),
        [
            *device.pinned(memory, 0),
            Source.pageable(np.frombuffer(data, np.uint8).ctypes.data),
            Source.file([(0, device.frame, descriptor, 0)]),
            Source.file([(0, device.frame, descriptor, 0)], keep=memory.address + device.frame),
        ],
        [device.frame] * 4,
        [4],
    ).wait()
    assert device.standin.count("pageable_copies") == before
