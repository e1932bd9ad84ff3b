"""A step reads an image while its later pages are still coming: what it may read stays until it has ended."""

from __future__ import annotations

import select
import threading

import pytest

from computron import _transfer
from computron.errors import SwapFailed
from computron.memory.swapper import OrderRefused

DEMAND = 0
PAGES = 12


@pytest.fixture
def slow():
    """A link that takes 16 ms for a page."""
    return _transfer.host_backend(link_bandwidth=4e6)


@pytest.fixture(params=[False, True], ids=["unverified", "verified"])
def verify(request):
    return request.param


@pytest.fixture
def make_image(make_store, make_swapper, sources):
    """A swapper with an image `a` of 12 pages in two segments, the first of two pages."""

    def make(on, *, verify=False, cache_pages=0):
        swapper = make_swapper(make_store(16, on=on), PAGES + cache_pages, on=on, verify=verify)
        page = sources.page
        source = sources.random(PAGES, seed=1, segment_ends=(2 * page, PAGES * page))
        registered = swapper.register(swapper._store.add("a", source), cache_bytes=cache_pages * page)
        return swapper, registered, source

    return make


def wait_readable(swapper) -> None:
    poller = select.poll()
    poller.register(swapper.completions_fd, select.POLLIN)
    assert poller.poll(30_000), "no completion came"


def first_pages(source, page):
    return {0: source.data[:page], 1: source.data[page : 2 * page]}


def test_pages_that_a_step_reads_stay_until_it_ends_when_a_copy_fails(make_image, slow, sources, device_bytes, finish):
    swapper, registered, source = make_image(slow)
    slow.inject_fault("copy", 12, "the link fell down")  # two chunks a page: long after the first segment
    swap = swapper.swap_in("a", range(PAGES), DEMAND)
    gate = swapper.begin_step("a")
    gate.wait(0)
    with pytest.raises(SwapFailed, match="the link fell down"):
        gate.wait(1)
    assert swap.transfer.wait(30)
    swapper._mapper.drain()
    wait_readable(swapper)
    assert swapper.completions() == []
    assert swapper.free_frames == 0
    with pytest.raises(SwapFailed, match="the link fell down"):
        gate.wait(0)
    assert device_bytes(swapper, registered, (0, 1)) == first_pages(source, sources.page)
    swapper.check()
    swapper.end_step("a")
    (outcome,) = finish(swapper)
    assert (outcome.state, outcome.arrived) == ("failed", ())
    assert "the link fell down" in outcome.error
    assert swapper.free_frames == PAGES
    swapper.check()
    swapper.swap_in("a", range(PAGES), DEMAND)
    assert finish(swapper)[0].state == "done"


def test_pages_that_a_step_reads_stay_until_it_ends_when_the_swap_is_cancelled(
    make_image, slow, sources, device_bytes, finish
):
    swapper, registered, source = make_image(slow)
    swap = swapper.swap_in("a", range(PAGES), DEMAND)
    gate = swapper.begin_step("a")
    gate.wait(0)
    swapper.cancel("a")
    with pytest.raises(SwapFailed, match="it was cancelled"):
        gate.wait(1)
    assert swap.transfer.wait(30)
    swapper._mapper.drain()
    assert swapper.completions() == []
    assert swapper.free_frames == 0
    assert device_bytes(swapper, registered, (0, 1)) == first_pages(source, sources.page)
    swapper.end_step("a")
    (outcome,) = finish(swapper)
    assert outcome.state == "cancelled"
    assert swapper.free_frames == PAGES - len(outcome.arrived)
    swapper.check()


def test_step_that_ends_first_holds_nothing_back(make_image, slow, finish):
    swapper, *_ = make_image(slow)
    slow.inject_fault("copy", 12, "the link fell down")
    swapper.swap_in("a", range(PAGES), DEMAND)
    swapper.begin_step("a").wait(0)
    swapper.end_step("a")
    assert finish(swapper)[0].state == "failed"
    assert swapper.free_frames == PAGES


def test_done_swap_is_told_of_while_the_step_runs(make_image, backend, verify, finish):
    swapper, *_ = make_image(backend, verify=verify)
    swapper.swap_in("a", range(PAGES), DEMAND)
    gate = swapper.begin_step("a")
    assert finish(swapper)[0].state == "done"
    gate.wait(1)
    swapper.end_step("a")
    assert swapper.begin_step("a").is_open
    swapper.end_step("a")


def test_failed_verification_reaches_the_step_and_is_told_of_at_its_end(make_image, backend, finish):
    swapper, registered, _ = make_image(backend, verify=True)
    store = swapper._store
    content = store._pages._table[registered.image.pages[5]]
    store._pages._arena.buffer(content.slot, 1)[0] ^= 1
    swap = swapper.swap_in("a", range(PAGES), DEMAND)
    gate = swapper.begin_step("a")
    errors = []

    def run() -> None:
        try:
            gate.wait(0)
        except SwapFailed as error:
            errors.append(str(error))

    running = threading.Thread(target=run)
    running.start()
    while swap.trouble is None:
        wait_readable(swapper)
        assert swapper.completions() == []
    running.join(30)
    swapper._mapper.drain()
    assert swapper.completions() == []
    assert errors == ["a could not be brought to the device: page 5 has a wrong digest on the device"]
    assert swapper.free_frames == 0
    swapper.end_step("a")
    assert finish(swapper)[0].state == "failed"
    assert swapper.free_frames == PAGES


def test_orders_that_take_memory_from_a_step_are_refused(make_image, backend, finish):
    swapper, *_ = make_image(backend, cache_pages=3)
    swapper.swap_in("a", range(PAGES), DEMAND)
    finish(swapper)
    swapper.set_cache("a", 2)
    swapper.begin_step("a")
    swapper.set_cache("a", 3)
    for order in (
        lambda: swapper.evict("a", (0,)),
        lambda: swapper.set_cache("a", 1),
        lambda: swapper.unregister("a"),
    ):
        with pytest.raises(OrderRefused, match=r"a cannot .* while a step of it runs"):
            order()
    assert swapper.resident_pages("a") == frozenset(range(PAGES))
    assert swapper.cache_frames("a") == 3
    swapper.end_step("a")
    swapper.set_cache("a", 0)
    swapper.evict("a", range(PAGES))
    assert swapper.free_frames == PAGES + 3
    swapper.unregister("a")


def test_pages_are_held_until_the_last_step_has_ended(make_image, backend, finish):
    swapper, *_ = make_image(backend)
    swapper.swap_in("a", range(PAGES), DEMAND)
    finish(swapper)
    for _ in range(2):
        assert swapper.begin_step("a").is_open
    swapper.end_step("a")
    with pytest.raises(OrderRefused, match=r"a cannot lose pages while a step of it runs"):
        swapper.evict("a", (0,))
    swapper.end_step("a")
    swapper.evict("a", (0,))


def test_a_step_that_has_not_begun_cannot_end(make_image, backend, finish):
    swapper, *_ = make_image(backend)
    swapper.swap_in("a", range(PAGES), DEMAND)
    finish(swapper)
    swapper.begin_step("a")
    swapper.end_step("a")
    with pytest.raises(AssertionError, match="no step of a has begun"):
        swapper.end_step("a")
    swapper.evict("a", (0,))


def test_a_swap_that_fails_is_told_after_the_last_step_that_began_during_it(make_image, slow):
    swapper, *_ = make_image(slow)
    swap = swapper.swap_in("a", range(PAGES), DEMAND)
    gates = [swapper.begin_step("a") for _ in range(2)]
    swapper.cancel_all()
    assert swap.transfer.wait(30)
    swapper._mapper.drain()
    for gate in gates:
        with pytest.raises(SwapFailed, match="it was cancelled"):
            gate.wait(0)
    swapper.end_step("a")
    assert swapper.completions() == []
    swapper.end_step("a")
    assert [outcome.state for outcome in swapper.completions()] == ["cancelled"]


def test_closing_ends_a_swap_that_waits_for_its_step(make_image, slow):
    swapper, *_ = make_image(slow)
    swap = swapper.swap_in("a", range(PAGES), DEMAND)
    gate = swapper.begin_step("a")
    swapper.cancel_all()
    assert swap.transfer.wait(30)
    swapper._mapper.drain()
    assert swapper.completions() == []
    with pytest.raises(SwapFailed, match="it was cancelled"):
        gate.wait(0)
    swapper.end_step("a")
    swapper.close()
    swapper._store.check()
