"""Pages are one page of the device where whoever orders says so, whatever their contents."""

from __future__ import annotations

import pytest

from computron.memory.swapper import OrderRefused

DEMAND = 0


@pytest.fixture
def two_equal(make_store, make_swapper, sources):
    """Images `a` and `b` of the same two pages, and frames for four."""
    store = make_store(8)
    swapper = make_swapper(store, 4)
    registered = {
        name: swapper.register(store.add(name, sources.in_memory(sources.data(2, seed=1)))) for name in ("a", "b")
    }
    return swapper, registered, sources.data(2, seed=1)


def test_equal_pages_share_a_frame_only_if_they_are_identified_as_one(two_equal, device_bytes, finish):
    swapper, registered, data = two_equal
    swapper.identify("a", (0, 1))
    swapper.identify("b", (0, 2))
    for name in ("a", "b"):
        swapper.swap_in(name, (0, 1), DEMAND)
        (outcome,) = finish(swapper)
        assert outcome.state == "done"
        assert b"".join(device_bytes(swapper, registered[name], (0, 1)).values()) == data
    assert swapper.free_frames == 1
    assert swapper.missing_pages("b") == 0


def test_what_is_on_the_device_keeps_its_identity(two_equal, finish):
    swapper, _, _ = two_equal
    swapper.swap_in("a", (0,), DEMAND)
    with pytest.raises(OrderRefused, match="while pages of it are on the device"):
        swapper.identify("a", (5, 6))
    finish(swapper)
    assert swapper.missing_pages("a") == 1
    swapper.evict("a", (0,))
    with pytest.raises(OrderRefused, match="has 2 pages, 1 were identified"):
        swapper.identify("a", (5,))
    swapper.identify("a", (5, 6))
