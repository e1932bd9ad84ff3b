"""Random kills, losses, late messages, restarts and moves: one history of every job, and it goes on."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parameter_service.master.world import World


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), often=st.sampled_from((0.02, 0.1, 0.4)))
def test_a_job_keeps_one_history_and_goes_on_after_whatever_happens(seed: int, often: float) -> None:
    world = World(seed)
    for _ in range(150):
        if world.random.random() < often:
            world.disturb()
        world.go_on()
        world.check()
    world.settle()
    assert list(world.replayed().records()) == list(world.master.state.book.records())
    job = world.master.state.jobs["lm"]
    if job.failed is not None:
        assert "snapshot" in job.failed
        return
    before = [worker.step for worker in world.workers.values()]
    world.settle(100)
    world.check()
    after = [worker.step for worker in world.workers.values()]
    assert min(after) > max(before), (job, world.now)
