from __future__ import annotations

import logging

import pytest

from computron import _transfer
from computron.errors import SwapFailed
from computron.memory.mapped_range import MappedRange

DEMAND = 0


class Stubborn:
    """Addresses that refuse one order each as they are told: with `half_way`, from its second slot on."""

    def __init__(self, addresses) -> None:
        self._addresses = addresses
        self.mapped, self.close = addresses.mapped, addresses.close
        self.refuse: dict[str, Exception] = {}
        self.half_way = False

    def map(self, slots, frames) -> None:
        if error := self.refuse.pop("map", None):
            if self.half_way:
                self._addresses.map(slots[:1], frames[:1])
            raise error
        self._addresses.map(slots, frames)

    def unmap(self, slots) -> None:
        if error := self.refuse.pop("unmap", None):
            if self.half_way:
                self._addresses.unmap(slots[:1])
            raise error
        self._addresses.unmap(slots)


@pytest.fixture
def pool(backend):
    pool = _transfer.DevicePool(backend, 64 << 10, 4)
    yield pool
    pool.close()


@pytest.fixture
def addresses(pool):
    addresses = Stubborn(_transfer.AddressRange(pool, 4 * pool.frame_bytes))
    yield addresses
    addresses.close()


@pytest.mark.parametrize("half_way", [False, True])
def test_slot_that_could_not_be_unmapped_is_replaced_by_the_next_mapping(pool, addresses, half_way, caplog):
    mapped = MappedRange("a.parameters", addresses)
    frames = pool.allocate(4)
    mapped.map((0, 1), frames[:2])
    addresses.half_way, addresses.refuse["unmap"] = half_way, RuntimeError("not now")
    with caplog.at_level(logging.WARNING):
        mapped.unmap((0, 1))
    stale = 1 if half_way else 2
    assert caplog.messages == [f"unmap_failed range=a.parameters slots=2 stale={stale} error=not now"]
    assert mapped.mapped() == {}
    mapped.map((1, 2), frames[2:])
    assert mapped.mapped() == {1: frames[2], 2: frames[3]}
    mapped.map((0,), frames[:1])
    assert mapped.mapped() == {0: frames[0], 1: frames[2], 2: frames[3]}


def test_mapping_that_failed_half_way_counts_as_not_mapped(pool, addresses):
    mapped = MappedRange("a.parameters", addresses)
    frames = pool.allocate(2)
    addresses.half_way, addresses.refuse["map"] = True, RuntimeError("no address")
    with pytest.raises(RuntimeError, match="no address"):
        mapped.map((0, 1), frames)
    assert mapped.mapped() == {}
    mapped.map((0, 1), frames[::-1])
    assert mapped.mapped() == {0: frames[1], 1: frames[0]}


def test_stale_slot_that_stays_fails_the_mapping_and_is_tried_again(pool, addresses):
    mapped = MappedRange("a.parameters", addresses)
    frames = pool.allocate(2)
    mapped.map((0,), frames[:1])
    addresses.refuse["unmap"] = RuntimeError("not now")
    mapped.unmap((0,))
    addresses.refuse["unmap"] = RuntimeError("still not")
    with pytest.raises(RuntimeError, match="still not"):
        mapped.map((0,), frames[1:])
    mapped.map((0,), frames[1:])
    assert mapped.mapped() == {0: frames[1]}


@pytest.fixture
def stubborn(make_store, make_swapper, sources):
    """A swapper of 8 frames with an image of 4 pages, and the addresses of its parameters and its cache."""
    swapper = make_swapper(make_store(8), 8)
    store_image = swapper._store.add("a", sources.random(4, seed=1))
    swapper.register(store_image, cache_bytes=4 * sources.page)
    ranges = []
    for mapped in (swapper._parameters["a"], swapper._caches["a"]):
        mapped._addresses = Stubborn(mapped._addresses)
        ranges.append(mapped._addresses)
    return swapper, *ranges


def test_swap_whose_mapping_raises_anything_fails_with_the_words(stubborn, finish):
    swapper, parameters, _ = stubborn
    parameters.refuse["map"] = ValueError("out of the blue")
    swapper.swap_in("a", range(4), DEMAND)
    with pytest.raises(SwapFailed, match="mapping pages 0 to 3 failed: out of the blue"):
        swapper.gate("a").wait(0)
    (outcome,) = finish(swapper)
    assert (outcome.state, outcome.error) == ("failed", "mapping pages 0 to 3 failed: out of the blue")
    assert swapper.free_frames == 8
    swapper.swap_in("a", range(4), DEMAND)
    assert finish(swapper)[0].state == "done"


def test_swap_whose_digest_raises_anything_fails_with_the_words(stubborn, finish, monkeypatch):
    swapper, *_ = stubborn

    def digest(content: int) -> bytes:
        raise KeyError("lost")

    monkeypatch.setattr(swapper, "_verify", True)
    monkeypatch.setattr(swapper._store, "digest", digest)
    swapper.swap_in("a", range(4), DEMAND)
    (outcome,) = finish(swapper)
    assert (outcome.state, outcome.error) == ("failed", "the digest of page 0 cannot be had: 'lost'")


def test_failed_unmap_does_not_hinder_the_next_swap(stubborn, finish):
    swapper, parameters, _ = stubborn
    swapper.swap_in("a", range(4), DEMAND)
    finish(swapper)
    parameters.refuse["unmap"] = RuntimeError("not now")
    swapper.evict("a", range(4))
    assert swapper.free_frames == 8
    swapper.check()
    swapper.swap_in("a", range(4), DEMAND)
    assert finish(swapper)[0].state == "done"
    swapper.check()


def test_mapping_fault_half_way_leaves_the_cache_as_it_was(stubborn):
    swapper, _, cache = stubborn
    swapper.set_cache("a", 1)
    cache.half_way, cache.refuse["map"] = True, ValueError("no address")
    with pytest.raises(SwapFailed, match="mapping the cache of a failed: no address"):
        swapper.set_cache("a", 4)
    assert (swapper.cache_frames("a"), swapper.free_frames) == (1, 7)
    swapper.check()
    swapper.set_cache("a", 4)
    swapper.check()


def test_cache_that_could_not_shrink_can_grow_again(stubborn):
    swapper, _, cache = stubborn
    swapper.set_cache("a", 3)
    cache.refuse["unmap"] = RuntimeError("not now")
    swapper.set_cache("a", 1)
    assert swapper.free_frames == 7
    swapper.check()
    swapper.set_cache("a", 4)
    swapper.check()


def test_mapping_fault_in_scattered_frames_leaves_the_cache_as_it_was(
    make_store, make_swapper, sources, finish, backend
):
    swapper = make_swapper(make_store(8), 8)
    swapper.register(swapper._store.add("a", sources.random(6, seed=1)), cache_bytes=4 * sources.page)
    swapper.swap_in("a", range(6), DEMAND)
    finish(swapper)
    swapper.evict("a", (1, 3, 5))
    swapper.set_cache("a", 1)
    swapper._mapper.drain()
    before = swapper.free_frames
    backend.inject_fault("map", 1, "no address")
    with pytest.raises(SwapFailed, match="no address"):
        swapper.set_cache("a", 4)
    assert (swapper.cache_frames("a"), swapper.free_frames) == (1, before)
    swapper.check()
    swapper.set_cache("a", 4)
    swapper.check()
