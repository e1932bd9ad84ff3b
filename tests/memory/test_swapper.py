from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from computron import _transfer
from computron.errors import OutOfMemory, SwapFailed
from computron.memory.swapper import OrderRefused

DEMAND, PREFETCH = 0, 1
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def standin() -> str:
    """The library that stands in for the CUDA driver."""
    command = [sys.executable, "setup.py", "-q", "build_standin"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.fixture(params=["host", "cuda over the stand-in driver"])
def backend(request) -> _transfer.Backend:
    if request.param == "host":
        return _transfer.host_backend()
    return _transfer.cuda_backend(library=request.getfixturevalue("standin"))


@pytest.fixture
def slow():
    """A backend whose link takes 16 ms for a page, so that a swap is under way for a while."""
    return _transfer.host_backend(link_bandwidth=4e6)


def pages_of(data: bytes, page_bytes: int) -> dict[int, bytes]:
    return {start // page_bytes: data[start : start + page_bytes] for start in range(0, len(data), page_bytes)}


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
    assert device_bytes(swapper, registered, range(6)) == pages_of(source.data, sources.page)


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
    assert device_bytes(swapper, registered, range(6)) == pages_of(source.data, sources.page)


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
        assert device_bytes(swapper, registered[name], range(6)) == pages_of(made[name].data, sources.page)
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
    assert device_bytes(swapper, registered["tuned"], range(6)) == pages_of(tuned.data, sources.page)


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
    assert device_bytes(swapper, registered, range(4)) == pages_of(source.data, sources.page)


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
    assert early == {index: pages_of(source.data, page)[index] for index in (0, 1)}


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


def test_cancelled_swap_keeps_what_arrived(make_store, make_swapper, sources, finish, slow, device_bytes):
    store = make_store(32, on=slow)
    swapper = make_swapper(store, 20, on=slow)
    page = sources.page
    source = sources.random(20, seed=1, segment_ends=(2 * page, 20 * page))
    registered = swapper.register(store.add("a", source))
    swapper.swap_in("a", range(20), DEMAND)
    gate = swapper.gate("a")
    gate.wait(0)
    swapper.cancel("a")
    (outcome,) = finish(swapper)
    assert outcome.state == "cancelled"
    assert 2 <= len(outcome.arrived) < 20
    assert swapper.resident_pages("a") == frozenset(outcome.arrived)
    assert swapper.free_frames == 20 - len(outcome.arrived)
    expected = pages_of(source.data, page)
    assert device_bytes(swapper, registered, outcome.arrived) == {index: expected[index] for index in outcome.arrived}
    swapper.check()
    with pytest.raises(SwapFailed, match="it was cancelled"):
        gate.wait(1)
    swapper.cancel("a")  # too late: nothing to do
    swapper.swap_in("a", sorted(set(range(20)) - set(outcome.arrived)), DEMAND)
    assert finish(swapper)[0].state == "done"
    assert device_bytes(swapper, registered, range(20)) == expected


def test_cancelling_wakes_the_run_that_waits(make_store, make_swapper, sources, finish, slow):
    store = make_store(32, on=slow)
    swapper = make_swapper(store, 20, on=slow)
    page = sources.page
    swapper.register(store.add("a", sources.random(20, seed=1, segment_ends=(page, 20 * page))))
    swapper.swap_in("a", range(20), DEMAND)
    gate = swapper.gate("a")
    errors = []

    def run() -> None:
        try:
            gate.wait(1)
        except SwapFailed as error:
            errors.append(str(error))

    running = threading.Thread(target=run)
    running.start()
    gate.wait(0)
    swapper.cancel_all()
    finish(swapper)
    running.join(30)
    assert len(errors) == 1
    assert "cancelled" in errors[0]


def test_link_fault_fails_the_swap_and_the_next_one_works(
    make_store, make_swapper, sources, finish, backend, device_bytes
):
    store = make_store(16)
    swapper = make_swapper(store, 8)
    source = sources.file(6, seed=1)
    registered = swapper.register(store.add("a", source))
    backend.inject_fault("copy", 5, "the link fell down")
    swapper.swap_in("a", range(6), DEMAND)
    gate = swapper.gate("a")
    with pytest.raises(SwapFailed, match="the link fell down"):
        gate.wait(0)
    (outcome,) = finish(swapper)
    assert (outcome.state, outcome.arrived) == ("failed", ())
    assert "the link fell down" in outcome.error
    assert swapper.resident_pages("a") == frozenset()
    assert swapper.free_frames == 8
    swapper.check()
    with pytest.raises(SwapFailed, match="the link fell down"):
        gate.wait(0)
    swapper.gate("a").wait(0)
    swapper.swap_in("a", range(6), DEMAND)
    swapper.gate("a").wait(0)
    assert finish(swapper)[0].state == "done"
    assert device_bytes(swapper, registered, range(6)) == pages_of(source.data, sources.page)


def test_failed_swap_takes_nothing_from_the_model_that_shares(
    make_store, make_swapper, sources, finish, backend, device_bytes
):
    store = make_store(16)
    swapper = make_swapper(store, 8)
    frozen = sources.data(3, seed=1)
    base = sources.in_memory(frozen)
    registered = swapper.register(store.add("base", base))
    swapper.register(store.add("tuned", sources.in_memory(frozen + sources.data(3, seed=2))))
    swapper.swap_in("base", range(3), DEMAND)
    finish(swapper)
    backend.inject_fault("copy", 2, "broken")
    swapper.swap_in("tuned", range(6), DEMAND)
    assert finish(swapper)[0].state == "failed"
    swapper.check()
    assert swapper.free_frames == 5
    assert device_bytes(swapper, registered, range(3)) == pages_of(frozen, sources.page)


def test_mapping_fault_fails_the_swap_and_the_next_one_works(
    make_store, make_swapper, sources, finish, backend, device_bytes
):
    store = make_store(16)
    swapper = make_swapper(store, 8)
    page = sources.page
    source = sources.random(6, seed=1, segment_ends=(2 * page, 4 * page, 6 * page))
    registered = swapper.register(store.add("a", source))
    backend.inject_fault("map", 1, "no address")
    swapper.swap_in("a", range(6), DEMAND)
    with pytest.raises(SwapFailed, match=r"mapping pages \d to \d failed: .*no address"):
        swapper.gate("a").wait(2)
    (outcome,) = finish(swapper)
    assert outcome.state == "failed"
    assert swapper.free_frames == 8
    swapper.check()
    swapper.swap_in("a", range(6), DEMAND)
    assert finish(swapper)[0].state == "done"
    assert device_bytes(swapper, registered, range(6)) == pages_of(source.data, page)


def test_changed_checkpoint_fails_the_swap(make_store, make_swapper, sources, finish, tmp_path):
    store = make_store(4)
    swapper = make_swapper(store, 8)
    swapper.register(store.add("a", sources.file(4, seed=1)))
    store.add("b", sources.file(4, seed=2))
    (tmp_path / "checkpoint-1").write_bytes(b"something else")
    swapper.swap_in("a", range(4), DEMAND)
    with pytest.raises(SwapFailed, match="has changed on disk"):
        swapper.gate("a").wait(0)
    (outcome,) = finish(swapper)
    assert outcome.state == "failed"
    assert "checkpoint-1 has changed on disk since it was loaded" in outcome.error
    assert swapper.free_frames == 8


def test_checkpoint_truncated_during_the_swap_fails_it(make_store, make_swapper, sources, finish, tmp_path, slow):
    store = make_store(4, on=slow)
    swapper = make_swapper(store, 16, on=slow)
    image = store.add("a", sources.file(16, seed=1))
    swapper.register(image)
    swapper.swap_in("a", range(16), DEMAND)
    with (tmp_path / "checkpoint-1").open("r+b") as file:
        file.truncate(sources.page)
    (outcome,) = finish(swapper)
    assert outcome.state == "failed"
    store.check()


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
        assert device_bytes(swapper, registered[name], range(count)) == pages_of(made[name].data, sources.page)
        assert store.statistics().used <= 3 * sources.page
        swapper.evict(name, range(count))
    assert store.statistics().pages_read_from_disk > 0


def test_verified_swap_is_done(make_store, make_swapper, sources, finish, device_bytes):
    store = make_store(3)
    swapper = make_swapper(store, 8, verify=True)
    source = sources.file(6.5, seed=1)
    registered = swapper.register(store.add("a", source))
    swapper.swap_in("a", range(7), DEMAND)
    waiting = threading.Thread(target=swapper.gate("a").wait, args=(0,))
    waiting.start()
    assert finish(swapper)[0].state == "done"
    waiting.join(30)
    assert not waiting.is_alive()
    assert device_bytes(swapper, registered, range(7)) == pages_of(source.data, sources.page)


def test_wrong_bytes_on_the_device_are_found_by_verification(make_store, make_swapper, sources, finish):
    store = make_store(8)
    swapper = make_swapper(store, 8, verify=True)
    image = store.add("a", sources.random(4, seed=1))
    swapper.register(image)
    content = store._pages._table[image.pages[2]]
    store._pages._arena.buffer(content.slot, 1)[0] ^= 1
    swapper.swap_in("a", range(4), DEMAND)
    gate = swapper.gate("a")
    (outcome,) = finish(swapper)
    assert outcome.state == "failed"
    assert outcome.error == "page 2 has a wrong digest on the device"
    with pytest.raises(SwapFailed, match="page 2 has a wrong digest"):
        gate.wait(0)
    assert swapper.free_frames == 8


def test_digest_that_cannot_be_had_fails_the_swap(make_store, make_swapper, sources, finish, backend):
    if backend.kind == "host":
        pytest.skip("the host computes digests in place, without a copy that could fail")
    store = make_store(8)
    swapper = make_swapper(store, 8, verify=True, chunk_bytes=sources.page)
    swapper.register(store.add("a", sources.random(4, seed=1)))
    backend.inject_fault("copy", 4, "broken")
    swapper.swap_in("a", range(4), DEMAND)
    (outcome,) = finish(swapper)
    assert outcome.state == "failed"
    assert outcome.error.startswith("the digest of page 0 cannot be had")
    assert swapper.free_frames == 8


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
        assert device_bytes(swapper, registered[name], range(6)) == pages_of(made[name].data, sources.page)
        assert store.statistics().used <= 10 * sources.page
        swapper.evict(name, range(6))
        turns += 1
    adding.join()
    assert errors == []


@pytest.mark.parametrize("verify", [False, True])
def test_cancelled_gates_raise_without_anybody_asking_for_completions(make_store, make_swapper, sources, verify):
    slow = _transfer.host_backend(link_bandwidth=2e5)
    store = make_store(16, on=slow)
    swapper = make_swapper(store, 16, on=slow, verify=verify)
    swapper.register(store.add("a", sources.random(16, seed=1)))
    swapper.swap_in("a", range(16), DEMAND)
    gate = swapper.gate("a")
    errors = []

    def run() -> None:
        try:
            gate.wait(0)
        except SwapFailed as error:
            errors.append(str(error))

    running = threading.Thread(target=run)
    running.start()
    swapper.cancel_all()
    running.join(30)
    assert errors == ["a could not be brought to the device: it was cancelled"]
    with pytest.raises(SwapFailed, match="it was cancelled"):
        gate.wait(0)
    swapper.close()
    with pytest.raises(SwapFailed):
        gate.wait(0)
    store.check()


def test_swap_cancelled_while_it_waits_for_its_verification_raises_and_keeps_what_arrived(
    make_store, make_swapper, sources, finish
):
    store = make_store(4)
    swapper = make_swapper(store, 4, verify=True)
    swapper.register(store.add("a", sources.random(4, seed=1)))
    swap = swapper.swap_in("a", range(4), DEMAND)
    assert swap.transfer.wait(30)  # its verification begins only in completions()
    swapper.cancel("a")
    with pytest.raises(SwapFailed, match="it was cancelled"):
        swap.wait(0)
    (outcome,) = finish(swapper)
    assert (outcome.state, outcome.arrived) == ("cancelled", (0, 1, 2, 3))
    swapper.check()


def test_closing_ends_what_is_under_way(make_store, make_swapper, sources, slow):
    store = make_store(16, on=slow)
    swapper = make_swapper(store, 16, on=slow)
    swapper.register(store.add("a", sources.random(16, seed=1)))
    swapper.swap_in("a", range(16), DEMAND)
    gate = swapper.gate("a")
    swapper.close()
    with pytest.raises(SwapFailed):
        gate.wait(0)
    store.check()
    swapper.close()


def test_device_without_room_for_a_page_is_refused(make_store, make_swapper):
    with pytest.raises(OutOfMemory, match="less than one page"):
        make_swapper(make_store(2), 0)
