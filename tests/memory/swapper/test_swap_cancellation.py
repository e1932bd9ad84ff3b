"""A swap that is cancelled keeps what has arrived, and lets go who waits for it."""

from __future__ import annotations

import threading

import pytest

from computron import _transfer
from computron.errors import SwapFailed

DEMAND = 0


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
    expected = sources.pages_of(source.data)
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
