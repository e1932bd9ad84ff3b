"""A network that is cut and healed does not split a job: an aggregator that cannot be asked may still be at work."""

from __future__ import annotations

from computron.parameter_service.master.events import Closed, Log, MoveAsked, Received, Tick
from computron.parameter_service.master.records import MemberGone
from computron.parameter_service.wire.messages import Progress, WorkerLost
from tests.parameter_service.master.test_loading import WORKERS, Loading
from tests.parameter_service.master.world import World
from tests.parameter_service.master.world_peers import SimPeer, SimWorker

FOR_EVER = 1e9


def training(*, workers: int) -> World:
    world = World(1, workers=workers)
    while min((worker.step for worker in world.workers.values()), default=0) < 4:
        world.go_on()
    return world


def cut_off(world: World, *peers: SimPeer) -> None:
    for peer in peers:
        peer.away_until = FOR_EVER
        world.close(peer)


def go_on(world: World, seconds: float) -> None:
    until = world.now + seconds
    while world.now < until:
        world.go_on()
        world.check()


def test_a_worker_that_is_cut_off_with_its_aggregator_keeps_the_job_to_itself() -> None:
    world = training(workers=1)
    alone = world.workers[0]
    assert alone.placement is not None
    owner = world.aggregators[alone.placement.addresses[0].aggregator]
    cut_off(world, alone, owner)
    newcomer = world.workers[1] = SimWorker(world, 1, "new")
    step = alone.step
    go_on(world, 20.0)
    assert alone.step > step
    assert newcomer.placement is None
    world.settle()
    world.check()
    assert newcomer.placement is not None
    assert newcomer.placement.members == (0, 1)
    assert min(alone.step, newcomer.step) > step


def test_an_aggregator_that_is_cut_off_alone_is_left_behind() -> None:
    world = training(workers=1)
    worker = world.workers[0]
    assert worker.placement is not None
    owner = world.aggregators[worker.placement.addresses[0].aggregator]
    cut_off(world, owner)
    world.cuts.add((0, owner.name))
    step = worker.step
    go_on(world, 20.0)
    assert worker.step > step
    assert owner.name not in {address.aggregator for address in worker.placement.addresses}
    owner.away_until = 0.0
    go_on(world, 20.0)
    assert owner.job is None or owner.job.epoch == worker.placement.epoch


def test_a_member_that_vanishes_before_it_follows_does_not_let_others_take_the_job() -> None:
    """The aggregator is cut off, a member comes back just long enough for a placement to be made that it never gets."""
    world = training(workers=1)
    member = world.workers[0]
    assert member.placement is not None
    owner = world.aggregators[member.placement.addresses[0].aggregator]
    cut_off(world, member, owner)
    newcomer = world.workers[1] = SimWorker(world, 1, "new")
    go_on(world, 6.0)  # the member counts as gone by now
    member.deaf, member.away_until = True, 0.0
    while world.master.state.jobs["lm"].book.epoch == 1 or world.master.state.jobs["lm"].change is not None:
        world.go_on()
    assert set(world.master.state.jobs["lm"].book.members) == {0, 1}
    cut_off(world, member)
    step = member.step
    go_on(world, 20.0)
    assert member.step > step  # which is why nobody else may take a step
    member.deaf = False
    world.settle()
    world.check()
    assert newcomer.placement is not None
    assert newcomer.placement.members == (0, 1)


def test_a_move_whose_target_dies_comes_to_nothing_and_the_job_goes_on() -> None:
    world = training(workers=1)
    worker = world.workers[0]
    assert worker.placement is not None
    owner = world.aggregators[worker.placement.addresses[0].aggregator]
    (target,) = [aggregator for aggregator in world.aggregators.values() if aggregator is not owner]
    world.tell(MoveAsked("lm", (0,), target.name))
    while owner.inbox:
        world.deliver(owner)
    assert owner.job is not None
    assert owner.job.blocks[0].target == target.name
    world.kill_aggregator(target)
    step = worker.step
    go_on(world, 10.0)
    assert worker.step > step + 1
    assert world.master.state.jobs["lm"].book.lost == 0


def test_a_worker_that_was_heard_again_is_not_known_to_be_dead() -> None:
    """Its link to an aggregator of its machine broke, it came back, and then it was cut off from the master."""
    job = Loading()
    job.tell(Received(1, WorkerLost("lm", 0, "0")))
    assert job.master.state.jobs["lm"].workers[0].lost_for_certain
    job.tell(Received(WORKERS[0], Progress("lm", 0, 1, 0, 0.0, 0.0)))
    job.tell(Closed(WORKERS[0]))
    job.now += 10.0
    job.tell(Tick())
    assert [order.record for order in job.sent if isinstance(order, Log) and isinstance(order.record, MemberGone)] == [
        MemberGone("lm", 0, False)
    ]
