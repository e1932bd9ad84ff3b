"""Whatever goes wrong during a swap fails that swap alone; verification finds what no copy reports."""

from __future__ import annotations

import threading

import pytest

from computron.errors import SwapFailed

DEMAND = 0


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
    assert device_bytes(swapper, registered, range(6)) == sources.pages_of(source.data)


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
    assert device_bytes(swapper, registered, range(3)) == sources.pages_of(frozen)


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
    assert device_bytes(swapper, registered, range(6)) == sources.pages_of(source.data)


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
    assert device_bytes(swapper, registered, range(7)) == sources.pages_of(source.data)


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
