"""KV caches take their frames from those of the parameters."""

from __future__ import annotations

import pytest
import torch

from computron.errors import SwapFailed
from computron.memory.swapper import OrderRefused

DEMAND = 0


def test_cache_range_has_the_frames_it_was_given(make_store, make_swapper, sources, finish):
    store = make_store(8)
    swapper = make_swapper(store, 8)
    page = sources.page
    registered = swapper.register(store.add("a", sources.random(2, seed=1)), cache_bytes=6 * page)
    swapper.set_cache("a", 3)
    cache = torch.from_dlpack(registered.cache.dlpack())
    cache[: 3 * page] = 7
    swapper.set_cache("a", 6)
    cache[3 * page :] = 9
    assert int(cache[3 * page - 1]) == 7
    assert (swapper.free_frames, swapper.cache_frames("a")) == (2, 6)
    assert swapper.statistics().cache_frames == 6
    swapper.set_cache("a", 1)
    assert swapper.free_frames == 7
    assert int(cache[page - 1]) == 7
    with pytest.raises(OrderRefused, match="still holds device memory"):
        swapper.unregister("a")
    with pytest.raises(OrderRefused, match="no room for a cache of 7 frames"):
        swapper.set_cache("a", 7)
    swapper.set_cache("a", 0)
    swapper.unregister("a")


def test_mapping_fault_leaves_the_cache_as_it_was(make_store, make_swapper, sources, backend):
    store = make_store(8)
    swapper = make_swapper(store, 8)
    swapper.register(store.add("a", sources.random(2, seed=1)), cache_bytes=6 * sources.page)
    swapper.set_cache("a", 2)
    backend.inject_fault("map", 0, "no address")
    with pytest.raises(SwapFailed, match=r"mapping the cache of a failed: .*no address"):
        swapper.set_cache("a", 4)
    assert (swapper.cache_frames("a"), swapper.free_frames) == (2, 6)
    swapper.check()
    swapper.set_cache("a", 4)


def test_parameters_and_caches_share_the_frames(make_store, make_swapper, sources, finish):
    store = make_store(8)
    swapper = make_swapper(store, 6)
    swapper.register(store.add("a", sources.random(4, seed=1)), cache_bytes=6 * sources.page)
    swapper.swap_in("a", range(4), DEMAND)
    finish(swapper)
    with pytest.raises(OrderRefused, match="needs 3 more frames and 2 are free"):
        swapper.set_cache("a", 3)
    swapper.evict("a", (3,))
    swapper.set_cache("a", 3)
    assert swapper.free_frames == 0


def test_image_with_device_memory_cannot_be_unregistered(make_store, make_swapper, sources, finish):
    store = make_store(8)
    swapper = make_swapper(store, 8)
    image = store.add("a", sources.random(2, seed=1))
    swapper.register(image)
    swapper.swap_in("a", range(2), DEMAND)
    with pytest.raises(OrderRefused, match="still holds device memory"):
        swapper.unregister("a")
    finish(swapper)
    swapper.evict("a", range(2))
    swapper.unregister("a")
    store.remove("a")
    swapper.register(store.add("a", sources.random(3, seed=2)))
