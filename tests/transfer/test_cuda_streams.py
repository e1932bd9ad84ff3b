"""On a device with streams a wait for a segment leaves the waiting to the device."""

from __future__ import annotations

import ctypes

import pytest

NON_BLOCKING = 1


class Snapshot:
    """A stream of the stand-in that copies device memory to the host, behind whatever the stream waits for."""

    def __init__(self, standin):
        self.standin = standin
        self.context = ctypes.c_void_p()
        standin.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)
        standin.call("cuCtxPushCurrent", self.context)
        self.stream = ctypes.c_void_p()
        standin.call("cuStreamCreate", ctypes.byref(self.stream), NON_BLOCKING)

    def take(self, target: int, address: int, nbytes: int) -> None:
        self.standin.call(
            "cuMemcpyDtoHAsync",
            ctypes.c_void_p(target),
            ctypes.c_ulonglong(address),
            ctypes.c_size_t(nbytes),
            self.stream,
        )

    def finish(self) -> None:
        self.standin.call("cuStreamSynchronize", self.stream)

    def close(self) -> None:
        self.standin.call("cuStreamDestroy", self.stream)
        self.standin.call("cuCtxPopCurrent", ctypes.byref(self.context))
        self.standin.call("cuDevicePrimaryCtxRelease", 0)


@pytest.fixture
def snapshot(standin_only):
    snapshot = Snapshot(standin_only.standin)
    yield snapshot
    standin_only.standin.hold(False)
    snapshot.close()


def test_a_stream_waits_for_a_segment_that_the_thread_does_not(standin_only, snapshot):
    device = standin_only
    pool, memory, target = device.pool(4), device.memory(3), device.memory(3)
    addresses = device.range(pool, 3)
    frames = pool.allocate(3)
    addresses.map([0, 1, 2], frames)
    engine = device.engine(pool, depth=64)
    device.standin.hold(True)
    device.standin.delay(0.002)
    transfer = engine.submit(frames, device.pinned(memory, 0, 1, 2), [device.frame] * 3, [2, 1])
    for segment, (first, count) in enumerate(((0, 2), (2, 1))):
        transfer.wait_segment(segment, snapshot.stream.value)
        start = first * device.frame
        snapshot.take(target.address + start, addresses.address + start, count * device.frame)
    assert transfer.bytes_done == 0, "nothing has arrived, and nobody has waited"
    device.standin.hold(False)
    snapshot.finish()
    assert bytes(target.buffer(0, target.nbytes)) == bytes(memory.buffer(0, memory.nbytes))
    transfer.wait()


def test_the_default_stream_can_wait(standin_only):
    device = standin_only
    pool, memory = device.pool(2), device.memory(2)
    transfer = device.send(device.engine(pool, depth=64), memory, pool.allocate(2))
    transfer.wait_segment(0)
    transfer.wait()
    assert transfer.state == "done"


def test_a_segment_that_has_arrived_needs_no_stream(standin_only):
    device = standin_only
    pool, memory = device.pool(2), device.memory(2)
    transfer = device.send(device.engine(pool), memory, pool.allocate(2))
    transfer.wait()
    transfer.wait_segment(0, stream=0)


def test_staged_chunks_travel_while_the_next_is_filled(standin_only, snapshot, tmp_path):
    """With copies held, as many chunks as the ring has are read, and no more."""
    device = standin_only
    pool = device.pool(4)
    data = device.bytes(2 * device.frame)
    (tmp_path / "file").write_bytes(data)
    engine = device.engine(pool, depth=2, staging_chunks=3)
    frames = pool.allocate(2)
    from computron._transfer import Source

    device.standin.hold(True)
    with (tmp_path / "file").open("rb") as file:
        sources = [Source.file([(0, device.frame, file.fileno(), page * device.frame)]) for page in range(2)]
        transfer = engine.submit(frames, sources, [device.frame] * 2, [2])
        while engine.statistics()["in_flight"] < 2:
            pass
        assert transfer.bytes_done == 0
        device.standin.hold(False)
        transfer.wait()
    assert b"".join(pool.read(frame, 0, device.frame) for frame in frames) == data


def test_a_gpu_stream_waits_for_a_segment(device):
    if not device.is_real:
        pytest.skip("of real devices")
    torch = pytest.importorskip("torch")
    pool, memory = device.pool(32), device.memory(32)
    addresses = device.range(pool, 32)
    frames = pool.allocate(32)
    addresses.map(range(32), frames)
    tensor = torch.from_dlpack(addresses.dlpack())
    engine = device.engine(pool, depth=8)
    compute = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(compute):
            tensor.zero_()
        compute.synchronize()
        transfer = engine.submit(frames, device.pinned(memory, *range(32)), [device.frame] * 32, [16, 16])
        parts = []
        with torch.cuda.stream(compute):
            for segment in range(2):
                transfer.wait_segment(segment, compute.cuda_stream)
                parts.append(tensor[segment * 16 * device.frame : (segment + 1) * 16 * device.frame].clone())
        compute.synchronize()
        assert torch.cat(parts).cpu().numpy().tobytes() == bytes(memory.buffer(0, memory.nbytes))
        transfer.wait()
