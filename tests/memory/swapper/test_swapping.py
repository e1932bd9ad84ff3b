"""What a swap-in brings, what it finds there already, and what is refused."""

from __future__ import annotations

import asyncio
import threading

import pytest

from computron.errors import OutOfMemory
from computron.memory.swapper import OrderRefused

DEMAND = 0


def test_swapped_in_bytes_equal_the_source(make_store, make_swapper, sources, finish, device_bytes):
    store = make_store(16)
    swapper = make_swapper(store, 8)
    source = sources.file(5.5, seed=1)
    registered = swapper.register(store.add("a", source))
    swapper.swap_in("a", range(6), DEMAND)
    (outcome,) = finish(swapper)
    assert (outcome.state, outcome.arrived, outcome.error) == ("done", tuple(range(6)), None)
    assert outcome.bytes_moved == source.nbytes
    assert outcome.started < outcome.finished
    assert swapper.resident_pages("a") == frozenset(range(6))
    assert swapper.free_frames == 2
    assert device_bytes(swapper, registered, range(6)) == sources.pages_of(source.data)


def test_only_missing_pages_move(make_store, make_swapper, sources, finish, device_bytes):
    store = make_store(16)
    swapper = make_swapper(store, 8)
    source = sources.file(6, seed=1)
    registered = swapper.register(store.add("a", source))
    swapper.swap_in("a", range(6), DEMAND)
    finish(swapper)
    swapper.evict("a", (3, 4, 5))
    assert swapper.free_frames == 5
    swapper.swap_in("a", (3, 4, 5), DEMAND)
    (outcome,) = finish(swapper)
    assert outcome.bytes_moved == 3 * sources.page
    assert device_bytes(swapper, registered, range(6)) == sources.pages_of(source.data)


def test_models_alternate_in_room_for_one(make_store, make_swapper, sources, finish, device_bytes):
    store = make_store(16)
    swapper = make_swapper(store, 6)
    made = {"a": sources.file(6, seed=1), "b": sources.random(6, seed=2)}
    registered = {name: swapper.register(store.add(name, source)) for name, source in made.items()}
    here = None
    for name in "abababab":
        if here:
            swapper.evict(here, range(6))
        swapper.swap_in(name, range(6), DEMAND)
        finish(swapper)
        assert device_bytes(swapper, registered[name], range(6)) == sources.pages_of(made[name].data)
        swapper.check()
        here = name
    assert swapper.statistics().swaps_done == 8
    assert swapper.statistics().bytes_moved == 8 * 6 * sources.page


def test_shared_pages_are_mapped_without_moving(make_store, make_swapper, sources, finish, device_bytes):
    store = make_store(16)
    swapper = make_swapper(store, 8)
    frozen = sources.data(4, seed=1)
    base, tuned = (sources.in_memory(frozen + sources.data(2, seed)) for seed in (2, 3))
    registered = {
        name: swapper.register(store.add(name, source)) for name, source in (("base", base), ("tuned", tuned))
    }
    swapper.swap_in("base", range(6), DEMAND)
    finish(swapper)
    swapper.swap_in("tuned", range(6), DEMAND)
    (outcome,) = finish(swapper)
    assert outcome.bytes_moved == 2 * sources.page
    statistics = swapper.statistics()
    assert (statistics.parameter_frames, statistics.shared_frames, statistics.free_frames) == (8, 4, 0)
    assert statistics.bytes_shared == 4 * sources.page
    swapper.evict("base", range(6))
    assert swapper.free_frames == 2
    assert device_bytes(swapper, registered["tuned"], range(6)) == sources.pages_of(tuned.data)


def test_swap_of_shared_pages_alone_moves_nothing(make_store, make_swapper, sources, finish, device_bytes):
    store = make_store(16)
    swapper = make_swapper(store, 8)
    source = sources.random(4, seed=1)
    swapper.register(store.add("a", source))
    registered = swapper.register(store.add("b", sources.in_memory(source.data)))
    swapper.swap_in("a", range(4), DEMAND)
    finish(swapper)
    swapper.swap_in("b", range(4), DEMAND)
    swapper.gate("b").wait(0)
    (outcome,) = finish(swapper)
    assert (outcome.state, outcome.bytes_moved) == ("done", 0)
    assert device_bytes(swapper, registered, range(4)) == sources.pages_of(source.data)


def test_content_in_flight_for_another_image_is_refused(make_store, make_swapper, sources, finish, slow):
    store = make_store(8, on=slow)
    swapper = make_swapper(store, 8, on=slow)
    source = sources.random(2, seed=1)
    swapper.register(store.add("a", source))
    swapper.register(store.add("b", sources.in_memory(source.data)))
    swapper.swap_in("a", range(2), DEMAND)
    with pytest.raises(OrderRefused, match="in flight for a"):
        swapper.swap_in("b", range(2), DEMAND)
    finish(swapper)


def test_pages_in_flight_cannot_be_evicted(make_store, make_swapper, sources, finish, slow):
    store = make_store(8, on=slow)
    swapper = make_swapper(store, 8, on=slow)
    swapper.register(store.add("a", sources.random(4, seed=1)))
    swapper.swap_in("a", range(4), DEMAND)
    with pytest.raises(OrderRefused, match="not resident"):
        swapper.evict("a", (0,))
    finish(swapper)


def test_swap_beyond_free_frames_is_refused(make_store, make_swapper, sources):
    store = make_store(8)
    swapper = make_swapper(store, 3)
    swapper.register(store.add("a", sources.random(4, seed=1)))
    with pytest.raises(OrderRefused, match="needs 4 frames and 3 of 3 are free"):
        swapper.swap_in("a", range(4), DEMAND)
    assert swapper.gate("a").wait(0) is None


def test_model_larger_than_the_host_budget_is_swapped_from_disk(
    make_store, make_swapper, sources, finish, device_bytes
):
    store = make_store(3)
    swapper = make_swapper(store, 12)
    made = {"a": sources.file(10, seed=1), "b": sources.random(12, seed=2)}
    registered = {name: swapper.register(store.add(name, source)) for name, source in made.items()}
    for name in "abab":
        count = len(registered[name].image.pages)
        swapper.swap_in(name, range(count), DEMAND)
        finish(swapper)
        assert device_bytes(swapper, registered[name], range(count)) == sources.pages_of(made[name].data)
        assert store.statistics().used <= 3 * sources.page
        swapper.evict(name, range(count))
    assert store.statistics().pages_read_from_disk > 0


def test_image_without_pages_can_be_served(make_store, make_swapper, sources):
    store = make_store(2)
    swapper = make_swapper(store, 2)
    registered = swapper.register(store.add("echo", sources.in_memory(b"", segment_ends=(0,))))
    swapper.gate("echo").wait(0)
    assert registered.parameters.nbytes == sources.page
    assert swapper.resident_pages("echo") == frozenset()


async def test_completions_reach_an_event_loop(make_store, make_swapper, sources):
    store = make_store(8)
    swapper = make_swapper(store, 8)
    swapper.register(store.add("a", sources.random(4, seed=1)))
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def ready() -> None:
        for outcome in swapper.completions():
            done.set_result(outcome)

    loop.add_reader(swapper.completions_fd, ready)
    swapper.swap_in("a", range(4), DEMAND)
    assert (await asyncio.wait_for(done, 30)).state == "done"
    loop.remove_reader(swapper.completions_fd)


def test_adding_and_swapping_go_on_side_by_side(make_store, make_swapper, sources, finish, device_bytes):
    store = make_store(10, load_threads=3)
    swapper = make_swapper(store, 6)
    made = {"a": sources.file(6, seed=1), "b": sources.random(6, seed=2)}
    registered = {name: swapper.register(store.add(name, source)) for name, source in made.items()}
    more = [sources.file(5, seed) if seed % 2 else sources.random(5, seed) for seed in range(10, 22)]
    errors = []

    def add() -> None:
        try:
            for number, source in enumerate(more):
                store.add(f"more-{number}", source)
                if number % 3:
                    store.remove(f"more-{number}")
        except BaseException as error:
            errors.append(error)
            raise

    adding = threading.Thread(target=add)
    adding.start()
    turns = 0
    while adding.is_alive() or turns < 8:
        name = "ab"[turns % 2]
        swapper.swap_in(name, range(6), DEMAND)
        assert finish(swapper)[0].state == "done"
        assert device_bytes(swapper, registered[name], range(6)) == sources.pages_of(made[name].data)
        assert store.statistics().used <= 10 * sources.page
        swapper.evict(name, range(6))
        turns += 1
    adding.join()
    assert errors == []


def test_device_without_room_for_a_page_is_refused(make_store, make_swapper):
    with pytest.raises(OutOfMemory, match="less than one page"):
        make_swapper(make_store(2), 0)
