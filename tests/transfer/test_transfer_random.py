"""Thousands of random jobs, checked against the bytes that each frame must hold."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from computron._transfer import Source

PAGES = 32


@pytest.mark.parametrize("seed", range(3))
def test_random_jobs_leave_the_right_bytes(device, seed, tmp_path):
    rng = random.Random(seed)
    pool, memory = device.pool(24), device.memory(PAGES, slab_pages=8)
    kept = device.memory(PAGES)
    pageable = np.frombuffer(device.bytes(PAGES * device.frame), np.uint8)
    (tmp_path / "pages").write_bytes(device.bytes(PAGES * device.frame))
    descriptor = os.open(tmp_path / "pages", os.O_RDONLY)
    engine = device.engine(pool, depth=rng.randint(1, 4), staging_chunks=rng.randint(1, 4))

    def source_of(page: int, nbytes: int) -> tuple[Source, bytes]:
        start = page * device.frame
        match rng.randrange(4):
            case 0:
                return Source.pinned(memory.address + start), bytes(memory.buffer(start, nbytes))
            case 1:
                return Source.pageable(pageable.ctypes.data + start), pageable[start : start + nbytes].tobytes()
            case 2:
                return Source.file([(0, nbytes, descriptor, start)]), os.pread(descriptor, nbytes, start)
            case _:
                keep = kept.address + start
                return Source.file([(0, nbytes, descriptor, start)], keep), os.pread(descriptor, nbytes, start)

    running = []

    def finish(transfer, frames, expected) -> None:
        transfer.wait()
        assert transfer.state in ("done", "cancelled")
        for index, (frame, data) in enumerate(zip(frames, expected, strict=True)):
            if transfer.page_done(index):
                assert pool.read(frame, 0, len(data)) == data
        assert transfer.state == "cancelled" or transfer.bytes_done == transfer.total_bytes
        pool.release(frames)

    jobs = 60 if device.is_real else 700
    for _ in range(jobs):
        while running and (len(running) > 6 or pool.free < 4):
            finish(*running.pop(rng.randrange(len(running))))
        count = rng.randint(0, 4)
        frames = pool.allocate(count)
        sizes = [rng.choice([device.frame, rng.randint(1, device.frame)]) for _ in frames]
        chosen = [source_of(page, nbytes) for page, nbytes in zip(rng.sample(range(PAGES), count), sizes, strict=True)]
        cut = rng.randint(0, count)
        transfer = engine.submit(
            frames, [source for source, _ in chosen], sizes, [cut, count - cut], priority=rng.randint(0, 2)
        )
        running.append((transfer, frames, [data for _, data in chosen]))
        if rng.random() < 0.2:
            rng.choice(running)[0].cancel()
        if rng.random() < 0.2:
            rng.choice(running)[0].raise_priority(rng.randint(0, 2))
    while running:
        finish(*running.pop())
    os.close(descriptor)
    assert pool.free == pool.frames
    assert len(engine.completions()) == jobs
    statistics = engine.statistics()
    assert statistics["transfers_done"] + statistics["transfers_cancelled"] == jobs
    assert (statistics["in_flight"], statistics["queued"]) == (0, 0)
