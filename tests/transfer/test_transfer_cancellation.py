"""Cancelling and closing, with chunks in flight."""

from __future__ import annotations

import threading

import pytest

from computron._transfer import TransferError


@pytest.fixture
def slow(device):
    device.slow_down(0.02)
    return device


def test_a_queued_transfer_is_cancelled_at_once(slow):
    pool, memory = slow.pool(8), slow.memory(4)
    engine = slow.engine(pool, depth=1)
    running = slow.send(engine, memory, pool.allocate(4))
    frames = pool.allocate(4)
    queued = slow.send(engine, memory, frames)
    assert queued.state == "queued"
    queued.cancel()
    assert queued.state == "cancelled"
    assert queued.bytes_done == 0
    assert queued.error is None
    pool.release(frames)
    assert pool.free == 4, "no chunk was in flight to them"
    running.wait()
    assert running.state == "done"


def test_frames_are_free_only_after_their_chunks_have_ended(slow):
    pool, memory = slow.pool(4), slow.memory(4)
    engine = slow.engine(pool, depth=1)
    frames = pool.allocate(4)
    transfer = slow.send(engine, memory, frames)
    while not (transfer.bytes_done and engine.statistics()["in_flight"]):
        pass
    transfer.cancel()
    assert transfer.state == "running"
    pool.release(frames)
    assert pool.free == 3, "the first frame has a chunk in flight"
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    transfer.wait()
    assert transfer.state == "cancelled"
    assert 0 < transfer.bytes_done < transfer.total_bytes
    assert pool.allocate(1) == [0]


def test_frames_released_without_cancelling_are_free_after_their_page(slow):
    pool, memory = slow.pool(2), slow.memory(2)
    engine = slow.engine(pool, depth=1)
    frames = pool.allocate(2)
    transfer = slow.send(engine, memory, frames)
    pool.release(frames)
    assert pool.free == 0
    with pytest.raises(TransferError, match="exhausted"):
        pool.allocate(1)
    transfer.wait()
    assert transfer.state == "done"
    assert pool.free == 2


def test_a_cancelled_transfer_releases_its_waiters(slow):
    pool, memory = slow.pool(8), slow.memory(8)
    transfer = slow.send(slow.engine(pool, depth=1), memory, pool.allocate(8))
    errors = []

    def wait():
        with pytest.raises(TransferError, match="cancelled") as caught:
            transfer.wait_segment(0)
        errors.append(caught)

    waiter = threading.Thread(target=wait)
    waiter.start()
    transfer.cancel()
    waiter.join()
    transfer.wait()
    assert len(errors) == 1
    assert transfer.state == "cancelled"


def test_cancelling_lets_the_next_one_through(slow):
    pool, memory = slow.pool(8), slow.memory(4)
    engine = slow.engine(pool, depth=1)
    first = slow.send(engine, memory, pool.allocate(4))
    frames = pool.allocate(4)
    second = slow.send(engine, memory, frames)
    first.cancel()
    second.wait()
    assert (first.state, second.state) == ("cancelled", "done")
    assert [pool.read(frame, 0, slow.frame) for frame in frames] == [slow.page(memory, page) for page in range(4)]
    assert engine.statistics()["transfers_cancelled"] == 1


def test_cancelling_an_ended_transfer_changes_nothing(device):
    pool, memory = device.pool(1), device.memory(1)
    engine = device.engine(pool)
    transfer = device.send(engine, memory, pool.allocate(1))
    transfer.wait()
    transfer.cancel()
    assert transfer.state == "done"
    assert len(engine.completions()) == 1


def test_a_transfer_whose_chunks_are_all_under_way_is_done(slow):
    pool, memory = slow.pool(1), slow.memory(1)
    engine = slow.engine(pool, depth=slow.chunks_per_frame)
    transfer = slow.send(engine, memory, pool.allocate(1))
    while engine.statistics()["queued"]:
        pass
    transfer.cancel()
    transfer.wait()
    assert transfer.state == "done"


def test_every_cancelled_transfer_is_reported_once(slow):
    pool, memory = slow.pool(8), slow.memory(2)
    engine = slow.engine(pool, depth=2)
    transfers = [slow.send(engine, memory, pool.allocate(2)) for _ in range(4)]
    for transfer in transfers[::-1]:
        transfer.cancel()
        transfer.cancel()
    for transfer in transfers:
        transfer.wait()
    assert sorted(ended.id for ended in engine.completions()) == [transfer.id for transfer in transfers]
    assert engine.completions() == []


def test_closing_cancels_waits_and_refuses(slow):
    pool, memory = slow.pool(8), slow.memory(4)
    engine = slow.engine(pool, depth=2)
    transfers = [slow.send(engine, memory, pool.allocate(4)) for _ in range(2)]
    engine.close()
    engine.close()
    assert {transfer.state for transfer in transfers} == {"cancelled"}
    assert engine.statistics()["in_flight"] == 0
    with pytest.raises(TransferError, match="closed"):
        slow.send(engine, memory, [0, 1, 2, 3])
    assert len(engine.completions()) == 2
    pool.release(range(8))
    assert pool.free == 8


def test_an_engine_that_is_dropped_closes(slow):
    pool, memory = slow.pool(4), slow.memory(4)
    engine = slow.engine(pool, depth=2)
    transfer = slow.send(engine, memory, pool.allocate(4))
    slow._closing.remove(engine)
    del engine
    assert transfer.state in ("cancelled", "done")
    assert transfer.wait(0)


def test_closing_while_others_wait_and_submit(device):
    pool, memory = device.pool(8), device.memory(2)
    engine = device.engine(pool)
    refused = threading.Event()

    def submit():
        while True:
            frames = pool.allocate(2)
            try:
                transfer = device.send(engine, memory, frames)
            except TransferError:
                refused.set()
                return
            finally:
                pool.release(frames)
            transfer.wait()

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join()
    assert refused.is_set()
    assert pool.free == 8


def test_the_pool_can_close_during_transfers(slow):
    pool, memory = slow.pool(4), slow.memory(4)
    engine = slow.engine(pool, depth=1)
    transfer = slow.send(engine, memory, pool.allocate(4))
    pool.close()
    transfer.wait()
    assert transfer.state == "done"
    with pytest.raises(TransferError, match="the pool is closed"):
        slow.send(engine, memory, [0])
