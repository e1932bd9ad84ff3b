"""Gates open segment by segment; the more urgent swap goes first."""

from __future__ import annotations

DEMAND, PREFETCH = 0, 1


def test_gate_opens_segment_by_segment(make_store, make_swapper, sources, finish, slow, device_bytes):
    store = make_store(16, on=slow)
    swapper = make_swapper(store, 10, on=slow)
    page = sources.page
    source = sources.random(10, seed=1, segment_ends=(2 * page, 5 * page, 10 * page))
    registered = swapper.register(store.add("a", source))
    swap = swapper.swap_in("a", range(10), DEMAND)
    gate = swapper.gate("a")
    gate.wait(0)
    assert swap.bytes_done >= 2 * page
    assert swap.transfer.segment_done(0)
    early = device_bytes(swapper, registered, (0, 1))
    assert not swap.transfer.segment_done(2)
    gate.wait(2)
    assert swap.bytes_done == 10 * page
    finish(swapper)
    gate.wait(1)
    swapper.gate("a").wait(2)
    assert early == {index: sources.pages_of(source.data)[index] for index in (0, 1)}


def test_gate_waits_only_for_missing_pages(make_store, make_swapper, sources, finish, slow):
    store = make_store(16, on=slow)
    swapper = make_swapper(store, 10, on=slow)
    page = sources.page
    image = store.add("a", sources.random(10, seed=1, segment_ends=(2 * page, 5 * page, 10 * page)))
    swapper.register(image)
    swapper.swap_in("a", range(5), DEMAND)
    finish(swapper)
    swap = swapper.swap_in("a", range(5, 10), DEMAND)
    swapper.gate("a").wait(1)
    assert swap.bytes_done < 5 * page
    swapper.gate("a").wait(2)
    assert swap.bytes_done == 5 * page
    finish(swapper)


def test_gate_of_a_segment_without_pages_waits_for_the_page_it_lies_on(make_store, make_swapper, sources, finish, slow):
    store = make_store(4, on=slow)
    swapper = make_swapper(store, 4, on=slow)
    page = sources.page
    swapper.register(store.add("a", sources.random(2, seed=1, segment_ends=(page // 4, page // 2, 2 * page))))
    swap = swapper.swap_in("a", (0, 1), DEMAND)
    swapper.gate("a").wait(1)
    assert swap.transfer.page_done(0)
    finish(swapper)


def test_demand_overtakes_a_prefetch(make_store, make_swapper, sources, finish, slow):
    store = make_store(32, on=slow)
    swapper = make_swapper(store, 16, on=slow)
    for number, name in enumerate("abc"):
        swapper.register(store.add(name, sources.random(4, seed=number)))
    for name, urgency in (("a", DEMAND), ("b", PREFETCH), ("c", DEMAND)):
        swapper.swap_in(name, range(4), urgency)
    assert [outcome.image_id for outcome in finish(swapper, 3)] == ["a", "c", "b"]


def test_raised_urgency_overtakes(make_store, make_swapper, sources, finish, slow):
    store = make_store(32, on=slow)
    swapper = make_swapper(store, 16, on=slow)
    for number, name in enumerate("abc"):
        swapper.register(store.add(name, sources.random(4, seed=number)))
    for name, urgency in (("a", DEMAND), ("b", PREFETCH), ("c", PREFETCH)):
        swapper.swap_in(name, range(4), urgency)
    swapper.raise_urgency("c", DEMAND)
    assert [outcome.image_id for outcome in finish(swapper, 3)] == ["a", "c", "b"]
    swapper.raise_urgency("c", DEMAND)  # too late: nothing to do
