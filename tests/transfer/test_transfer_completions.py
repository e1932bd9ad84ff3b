"""Word of what has ended, through an eventfd."""

from __future__ import annotations

import asyncio
import select


def is_readable(fd):
    return bool(select.select([fd], [], [], 0)[0])


def test_the_descriptor_is_readable_while_there_are_completions(device):
    pool, memory = device.pool(4), device.memory(2)
    engine = device.engine(pool)
    assert not is_readable(engine.completions_fd)
    assert engine.completions() == []
    transfers = [device.send(engine, memory, pool.allocate(2)) for _ in range(2)]
    for transfer in transfers:
        transfer.wait()
    assert is_readable(engine.completions_fd)
    ended = sorted(engine.completions(), key=lambda transfer: transfer.id)
    assert ended == transfers
    assert ended[0] is transfers[0], "the same object"
    assert not is_readable(engine.completions_fd)


def test_completions_are_kept_until_collected_even_if_nobody_holds_them(device):
    pool, memory = device.pool(4), device.memory(2)
    engine = device.engine(pool)
    device.send(engine, memory, pool.allocate(2)).wait()
    (ended,) = engine.completions()
    assert ended.state == "done"


async def test_a_loop_hears_of_every_end(device):
    pool, memory = device.pool(8), device.memory(2)
    engine = device.engine(pool)
    loop = asyncio.get_running_loop()
    ended: asyncio.Queue[int] = asyncio.Queue()

    def collect() -> None:
        for transfer in engine.completions():
            ended.put_nowait(transfer.id)

    loop.add_reader(engine.completions_fd, collect)
    try:
        for _ in range(50):
            frames = pool.allocate(8)
            transfers = [device.send(engine, memory, frames[index : index + 2]) for index in range(0, 8, 2)]
            heard = {await ended.get() for _ in transfers}
            assert heard == {transfer.id for transfer in transfers}
            pool.release(frames)
    finally:
        loop.remove_reader(engine.completions_fd)
