from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from computron.parameter_service.aggregator.pages import Pages
from computron.parameter_service.wire.segments import HUGE_PAGE, Segment


@pytest.fixture
def pages():
    thread = Pages()
    yield thread
    thread.close()


async def all_done(pages: Pages) -> None:
    done = asyncio.Event()
    pages.touch([], done.set)
    async with asyncio.timeout(10):
        await done.wait()


async def test_what_a_step_waits_for_comes_before_huge_pages(pages, monkeypatch):
    order = []
    blocked, go_on = threading.Event(), threading.Event()
    segments = [Segment.create(str(number), 2 * HUGE_PAGE) for number in range(2)]
    monkeypatch.setattr(Segment, "enlarge", lambda self, offset: order.append((segments.index(self), offset)) or True)
    monkeypatch.setattr(Segment, "touch", lambda self: order.append("touched"))
    pages.release(lambda: (blocked.set(), go_on.wait()))
    blocked.wait()
    pages.enlarge(segments)
    pages.touch(segments[:1], lambda: None)
    go_on.set()
    async with asyncio.timeout(10):
        while len(order) < 5:
            await asyncio.sleep(0.001)
    assert order == ["touched", (0, 0), (1, 0), (0, HUGE_PAGE), (1, HUGE_PAGE)]


async def test_a_segment_that_is_gone_is_left_alone(pages, monkeypatch):
    blocked, go_on = threading.Event(), threading.Event()
    enlarged = []
    monkeypatch.setattr(Segment, "enlarge", lambda self, offset: enlarged.append(offset))
    pages.release(lambda: (blocked.set(), go_on.wait()))
    blocked.wait()
    gone = Segment.create("gone", HUGE_PAGE)
    pages.enlarge([gone])
    gone.close()
    known = weakref.ref(gone)
    del gone
    gc.collect()
    assert known() is None
    go_on.set()
    await all_done(pages)
    await asyncio.sleep(0.01)
    assert enlarged == []


async def test_one_failure_ends_nothing(pages, caplog):
    def fail() -> None:
        raise RuntimeError("pages are gone")

    pages.release(fail)
    await all_done(pages)
    assert "pages are gone" in caplog.text
