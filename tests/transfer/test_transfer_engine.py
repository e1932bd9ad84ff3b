"""Transfers: bytes, order, segments, progress, statistics."""

from __future__ import annotations

import threading

import pytest

from computron._transfer import Source, TransferEngine, TransferError


def contents(device, pool, frames):
    return [pool.read(frame, 0, device.frame) for frame in frames]


def test_pages_arrive_in_their_frames(device):
    pool, memory = device.pool(8), device.memory(5)
    frames = pool.allocate(5)[::-1]
    transfer = device.send(device.engine(pool), memory, frames)
    assert transfer.wait()
    assert (transfer.state, transfer.error) == ("done", None)
    assert transfer.bytes_done == transfer.total_bytes == 5 * device.frame
    assert transfer.seconds > 0
    assert contents(device, pool, frames) == [device.page(memory, page) for page in range(5)]


@pytest.mark.parametrize("size", [1, 4095, 4096, -1, 0])
def test_a_page_smaller_than_its_frame_leaves_the_rest_alone(device, size):
    nbytes = size if size > 0 else device.frame + size
    pool, memory = device.pool(2), device.memory(1)
    (frame,) = pool.allocate(1)
    before = device.bytes(device.frame)
    pool.write(frame, 0, before)
    transfer = device.engine(pool).submit([frame], device.pinned(memory, 0), [nbytes], [1])
    transfer.wait()
    assert transfer.bytes_done == nbytes
    assert contents(device, pool, [frame]) == [device.page(memory, 0)[:nbytes] + before[nbytes:]]


@pytest.mark.parametrize("chunks", [1, 3, 4, 7])
@pytest.mark.parametrize("depth", [1, 4])
def test_any_chunk_size_and_depth_will_do(device, chunks, depth):
    pool, memory = device.pool(4), device.memory(4)
    engine = device.engine(pool, chunk_bytes=device.frame // chunks, depth=depth, staging_chunks=depth)
    frames = pool.allocate(4)
    device.send(engine, memory, frames).wait()
    assert contents(device, pool, frames) == [device.page(memory, page) for page in range(4)]


def test_an_empty_transfer_is_done_at_once(device):
    engine = device.engine(device.pool(1))
    transfer = engine.submit([], [], [], [0, 0])
    assert transfer.state == "done"
    assert transfer.segment_done(1)
    transfer.wait_segment(0)
    assert [ended.id for ended in engine.completions()] == [transfer.id]


def test_smaller_priorities_go_first(device):
    device.slow_down(0.01)
    pool, memory = device.pool(12), device.memory(2)
    engine = device.engine(pool, depth=1)
    names = {}

    def send(name, **options):
        names[device.send(engine, memory, pool.allocate(2), **options).id] = name

    send("first", priority=9)
    send("background", priority=2)
    send("late deadline", priority=1, deadline=50.0)
    send("early deadline", priority=1, deadline=5.0)
    send("no deadline", priority=1)
    send("demand", priority=0)
    order = ended_in_order(engine, len(names), names)
    assert order == ["demand", "early deadline", "late deadline", "no deadline", "background", "first"]


def test_equal_ranks_go_in_order_of_submission(device):
    pool, memory = device.pool(8), device.memory(2)
    engine = device.engine(pool, depth=1)
    transfers = [device.send(engine, memory, pool.allocate(2), priority=3) for _ in range(4)]
    assert ended_in_order(engine, 4, {transfer.id: transfer.id for transfer in transfers}) == [
        transfer.id for transfer in transfers
    ]


def test_a_raised_transfer_overtakes(device):
    device.slow_down(0.01)
    pool, memory = device.pool(8), device.memory(3)
    engine = device.engine(pool, depth=1)
    first = device.send(engine, memory, pool.allocate(3), priority=1)
    second = device.send(engine, memory, pool.allocate(3), priority=2)
    second.raise_priority(0)
    assert ended_in_order(engine, 2, {first.id: "first", second.id: "second"}) == ["second", "first"]


def test_raising_never_lowers(device):
    device.slow_down(0.01)
    pool, memory = device.pool(8), device.memory(2)
    engine = device.engine(pool, depth=1)
    first = device.send(engine, memory, pool.allocate(2), priority=1)
    second = device.send(engine, memory, pool.allocate(2), priority=2)
    first.raise_priority(9)
    assert ended_in_order(engine, 2, {first.id: "first", second.id: "second"}) == ["first", "second"]
    first.raise_priority(0)  # it has ended: nothing to raise


def test_segments_end_in_order(device):
    device.slow_down(0.005)
    pool, memory = device.pool(6), device.memory(6)
    engine = device.engine(pool, depth=1)
    frames = pool.allocate(6)
    transfer = engine.submit(frames, device.pinned(memory, *range(6)), [device.frame] * 6, [1, 0, 2, 3])
    stream = 0
    for segment, pages in enumerate(([0], [], [1, 2], [3, 4, 5])):
        transfer.wait_segment(segment, stream)
        if device.has_streams:
            continue
        assert transfer.segment_done(segment)
        assert all(transfer.page_done(page) for page in pages)
        for page in pages:
            assert pool.read(frames[page], 0, device.frame) == device.page(memory, page)
    transfer.wait()
    assert all(transfer.segment_done(segment) for segment in range(4))


def test_a_wait_for_a_segment_does_not_wait_for_the_next(device):
    device.slow_down(0.05)
    pool, memory = device.pool(8), device.memory(8)
    transfer = device.engine(pool, depth=1).submit(
        pool.allocate(8), device.pinned(memory, *range(8)), [device.frame] * 8, [1, 7]
    )
    transfer.wait_segment(0)
    assert transfer.state == "running"
    assert not transfer.segment_done(1)
    transfer.cancel()


def test_pages_and_segments_outside_a_transfer_are_refused(device):
    pool, memory = device.pool(1), device.memory(1)
    transfer = device.send(device.engine(pool), memory, pool.allocate(1))
    for use in (transfer.page_done, transfer.segment_done, transfer.wait_segment):
        with pytest.raises(IndexError):
            use(1)


def test_a_wait_can_time_out(device):
    device.slow_down(0.05)
    pool, memory = device.pool(2), device.memory(2)
    transfer = device.send(device.engine(pool, depth=1), memory, pool.allocate(2))
    assert not transfer.wait(0)
    assert not transfer.wait(timeout=0.001)
    assert transfer.seconds == 0
    assert transfer.wait()
    assert transfer.wait(0)


def test_waits_release_the_gil(device):
    device.slow_down(0.02)
    pool, memory = device.pool(4), device.memory(4)
    transfer = device.send(device.engine(pool, depth=1), memory, pool.allocate(4))
    waiters = [threading.Thread(target=transfer.wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    assert transfer.state in ("queued", "running")
    for waiter in waiters:
        waiter.join()
    assert transfer.state == "done"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sources": 1}, ValueError),
        ({"page_bytes": [1]}, ValueError),
        ({"segment_pages": [1]}, ValueError),
        ({"page_bytes": [0, 1]}, ValueError),
        ({"page_bytes": [1, 1 << 40]}, ValueError),
        ({"frames": [0, 7]}, TransferError),
        ({"frames": [0, 99]}, ValueError),
        ({"frames": [0, -1]}, ValueError),
        ({"deadline": float("nan")}, ValueError),
    ],
)
def test_a_wrong_submission_is_refused_and_takes_nothing(device, change, error):
    pool, memory = device.pool(8), device.memory(2)
    engine = device.engine(pool)
    request = {
        "frames": pool.allocate(2),
        "sources": device.pinned(memory, 0, 1),
        "page_bytes": [device.frame] * 2,
        "segment_pages": [2],
    }
    if change == {"sources": 1}:
        change = {"sources": device.pinned(memory, 0)}
    with pytest.raises(error):
        engine.submit(**{**request, **change})
    assert engine.completions() == []
    pool.release([0, 1])
    assert pool.free == 8


def test_statistics_count_what_happened(device):
    pool, memory = device.pool(4), device.memory(3)
    engine = device.engine(pool)
    device.send(engine, memory, pool.allocate(3)).wait()
    engine.submit([], [], [], [])
    statistics = engine.statistics()
    assert statistics.pop("seconds_busy") > 0
    assert statistics == {
        "bytes": 3 * device.frame,
        "chunks": 3 * device.chunks_per_frame,
        "transfers_done": 2,
        "transfers_failed": 0,
        "transfers_cancelled": 0,
        "in_flight": 0,
        "queued": 0,
    }


def test_pages_travel_back(device):
    pool, memory = device.pool(4), device.memory(4)
    engine = device.engine(pool)
    frames = pool.allocate(3)
    pages = [device.bytes(device.frame) for _ in frames]
    for frame, page in zip(frames, pages, strict=True):
        pool.write(frame, 0, page)
    before = device.page(memory, 3)
    addresses = [memory.address + page * device.frame for page in (2, 0, 3)]
    transfer = engine.fetch(frames, addresses, [device.frame, device.frame, 100])
    transfer.wait()
    assert transfer.state == "done"
    assert [device.page(memory, page) for page in (2, 0)] == pages[:2]
    assert device.page(memory, 3) == pages[2][:100] + before[100:]
    assert engine.statistics()["bytes"] == 0, "the other direction"
    assert [ended.id for ended in engine.completions()] == [transfer.id]
    with pytest.raises(TransferError, match="not inside one committed slab"):
        engine.fetch(frames[:1], [4096], [1])


def test_both_directions_at_once(device):
    pool, memory = device.pool(8), device.memory(8)
    engine = device.engine(pool)
    down, up = pool.allocate(4), pool.allocate(4)
    pages = [device.bytes(device.frame) for _ in up]
    for frame, page in zip(up, pages, strict=True):
        pool.write(frame, 0, page)
    transfers = [
        device.send(engine, memory, down),
        engine.fetch(up, [memory.address + page * device.frame for page in range(4, 8)], [device.frame] * 4),
    ]
    for transfer in transfers:
        transfer.wait()
    assert contents(device, pool, down) == [device.page(memory, page) for page in range(4)]
    assert [device.page(memory, page) for page in range(4, 8)] == pages


def test_an_engine_needs_a_pool_of_its_backend(device):
    pool = device.pool(1)
    with pytest.raises(ValueError, match="another backend"):
        TransferEngine(device.make_backend(), pool, chunk_bytes=4096)
    for options in ({"chunk_bytes": 0}, {"depth": 0}, {"staging_chunks": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            device.engine(pool, **options)


def test_sources_can_be_used_again(device):
    pool, memory = device.pool(4), device.memory(1)
    engine = device.engine(pool)
    source = Source.pinned(memory.address)
    frames = pool.allocate(4)
    engine.submit(frames, [source] * 4, [device.frame] * 4, [4]).wait()
    assert contents(device, pool, frames) == [device.page(memory, 0)] * 4


def ended_in_order(engine, count, names):
    """Names of `count` transfers in the order of their ends."""
    order = []
    while len(order) < count:
        order += [names[transfer.id] for transfer in engine.completions()]
    return order
