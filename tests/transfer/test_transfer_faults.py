"""What fails, fails with its words, and the rest goes on. A device that is gone says so."""

from __future__ import annotations

import pytest

from computron._transfer import DeviceFailed, TransferError


@pytest.fixture
def faulty(device):
    device.demand_faults()
    return device


def test_a_copy_that_fails_fails_its_transfer_alone(faulty):
    pool, memory = faulty.pool(8), faulty.memory(4)
    engine = faulty.engine(pool)
    frames = pool.allocate(4)
    faulty.backend.inject_fault("copy", 6, "the cable was pulled")
    transfer = faulty.send(engine, memory, frames)
    transfer.wait()
    assert transfer.state == "failed"
    assert "the cable was pulled" in transfer.error
    assert not transfer.page_done(1)
    with pytest.raises(TransferError, match="the cable was pulled"):
        transfer.wait_segment(0)
    pool.release(frames)
    assert pool.free == 8
    assert [ended.state for ended in engine.completions()] == ["failed"]
    assert engine.statistics()["transfers_failed"] == 1

    frames = pool.allocate(4)
    again = faulty.send(engine, memory, frames)
    again.wait()
    assert again.state == "done"
    assert faulty.backend.failed is None
    assert [pool.read(frame, 0, faulty.frame) for frame in frames] == [faulty.page(memory, page) for page in range(4)]


def test_other_transfers_go_on_after_a_failed_copy(faulty):
    pool, memory = faulty.pool(8), faulty.memory(4)
    engine = faulty.engine(pool, depth=1)
    faulty.backend.inject_fault("copy", 5, "once")
    transfers = [faulty.send(engine, memory, pool.allocate(1), page) for page in range(4)]
    for transfer in transfers:
        transfer.wait()
    assert [transfer.state for transfer in transfers] == ["done", "failed", "done", "done"]


def test_a_pool_that_cannot_be_created_says_why_and_leaves_nothing(faulty):
    faulty.backend.inject_fault("create", 0, "out of frames")
    with pytest.raises(TransferError, match="out of frames"):
        faulty.pool(4)
    assert faulty.pool(4).free == 4


def test_unknown_operations_cannot_fail(faulty):
    with pytest.raises(ValueError, match="knows no operation"):
        faulty.backend.inject_fault("sneeze", 0, "bless you")


def test_a_failed_device_fails_everything_with_its_words(faulty):
    faulty.slow_down(0.01)
    pool, memory = faulty.pool(8), faulty.memory(4)
    engine = faulty.engine(pool, depth=2)
    addresses = faulty.range(pool, 2)
    frames = pool.allocate(4)
    addresses.map([0], frames[:1])
    first, second = faulty.send(engine, memory, frames), faulty.send(engine, memory, pool.allocate(4))
    faulty.backend.inject_fault("device", 3, "the device fell off the bus")
    first.wait()
    second.wait()
    for transfer in (first, second):
        assert transfer.state == "failed"
        assert "the device fell off the bus" in transfer.error
        with pytest.raises(DeviceFailed, match="fell off the bus"):
            transfer.wait_segment(0)
    assert "the device fell off the bus" in faulty.backend.failed
    for use in (
        lambda: faulty.send(engine, memory, frames),
        lambda: pool.read(0, 0, 1),
        lambda: pool.write(0, 0, b"x"),
        lambda: pool.digest(0, 1),
        lambda: addresses.map([1], frames[1:2]),
        lambda: faulty.pool(1),
        lambda: faulty.range(pool, 1),
        lambda: faulty.memory(1),
        lambda: faulty.engine(pool),
    ):
        with pytest.raises(DeviceFailed, match="fell off the bus"):
            use()
    assert len(engine.completions()) == 2
    pool.release(range(8))
    assert pool.free == 8


def test_a_failed_device_is_still_an_error_of_transfers():
    assert issubclass(DeviceFailed, TransferError)
    assert issubclass(TransferError, RuntimeError)


def test_a_real_device_takes_no_faults(device):
    if not device.is_real:
        pytest.skip("of real devices")
    with pytest.raises(TransferError, match="not into a real device"):
        device.backend.inject_fault("copy", 0, "no")
