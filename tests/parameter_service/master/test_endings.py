"""What a job keeps and what it loses when much ends at once; without a clock or a network."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from computron.errors import BadRequest
from computron.parameter_service.master.events import Closed, DrainAsked, Exited, Finished, MoveAsked
from computron.parameter_service.master.records import Book
from computron.parameter_service.master.views import aggregator_view, job_view
from computron.parameter_service.wire.messages import (
    BlockState,
    Complete,
    Denied,
    Drop,
    Failed,
    Held,
    HeldCommit,
    Hold,
    Host,
    Keep,
    Leave,
    MovedOut,
    Placement,
    Progress,
    Ready,
    Saved,
    Stop,
    Usage,
    WorkerLost,
)
from tests.parameter_service.master.fakes import enlist, job_spec
from tests.parameter_service.master.test_scaling import Bench

SNAPSHOT = "/files/lm/snapshot-{}-{}.safetensors"


class Small(Bench):
    """One job of two blocks and one worker, and aggregators; all at the step that is said last."""

    def __init__(self, *names: str, **fields: Any) -> None:
        super().__init__(starts=False, maximum=4)
        for pid, name in enumerate(names, 1):
            self.register(name, pid)
        self.train("lm", **{"snapshot_every": 10} | fields)
        (self.owner,) = set(self.job.book.owners)
        self.wait(0.1)

    @property
    def job(self) -> Any:
        return self.master.state.jobs["lm"]

    def at(self, step: int) -> None:
        self.say("lm", Progress("lm", 0, self.job.book.epoch, step, 0.1, 0.1))

    def snapshot(self, step: int) -> None:
        self.tell(Finished("lm", "", step, SNAPSHOT.format(step, self.job.book.epoch), 0.0))

    def answer(self, name: str, states: dict[int, int], commits: tuple[HeldCommit, ...] = (), **fields: Any) -> None:
        """To the last `Hold`."""
        blocks = tuple(BlockState(*pair) for pair in states.items())
        self.say(name, Held("lm", self.heard(name, Hold)[-1].epoch, blocks, commits, **fields))

    def unlink(self, who: str) -> None:
        self.tell(Closed(self.links[who]))

    def kill_worker(self) -> None:
        """On the machine of the aggregator."""
        self.say(self.owner, WorkerLost("lm", 0, "a"))
        self.unlink("lm")
        self.wait(1.0)

    def come_again(self, incarnation: str, **fields: Any) -> None:
        self.links["lm"] = 900 + len(self.sent)
        self.say("lm", enlist(self.job.book.spec, incarnation=incarnation, **fields))
        self.wait(0.1)


def replayed(bench: Bench) -> Book:
    book = Book()
    for record in bench.records:
        book.apply(record)
    return book


@pytest.mark.parametrize("step", [0, 500])
def test_the_death_of_a_master_and_an_aggregator_at_once_does_not_hide_how_far_the_job_was(step: int) -> None:
    """Nothing could be saved: what the worker has may be of different steps, also if it has seen none."""
    bench = Small("one")
    bench.say("one", Failed("lm", 1, "save", "no folder"))
    bench.at(step)
    again = Bench(starts=False, maximum=4, book=replayed(bench))
    again.links["lm"] = 7
    again.say("lm", msgspec.structs.replace(enlist(bench.job.book.spec), epoch=1, step=step))
    again.tell(Exited("one"))
    again.register("two", 2)
    again.wait(0.1)
    assert "no snapshot could be written" in again.master.state.jobs["lm"].failed
    assert again.heard("lm", Denied)


def test_a_step_of_an_epoch_that_was_rolled_back_is_not_the_jobs() -> None:
    bench = Small("one", "two")
    bench.snapshot(50)
    bench.at(60)
    bench.tell(Exited(bench.owner))
    (other,) = {"one", "two"} - {bench.owner}
    bench.say(other, Ready("lm", 2, (BlockState(0, 50), BlockState(1, 50))))
    bench.say("lm", msgspec.structs.replace(enlist(bench.job.book.spec), epoch=1, step=60))
    assert bench.job.step == 50


def test_a_job_that_fails_gives_its_memory_back_and_nobody_waits_for_its_moves() -> None:
    bench = Small("one", "two", "three", snapshot_every=0)
    (to, _) = sorted({"one", "two", "three"} - {bench.owner})
    bench.at(5)
    bench.tell(MoveAsked("lm", (0,), to))
    bench.say(bench.owner, MovedOut("lm", 1, (0,), to, 5))
    bench.tell(MoveAsked("lm", (1,), to))
    bench.tell(Exited(to))
    bench.answer(bench.owner, {1: 5})
    assert "no snapshots are taken" in bench.job.failed
    assert bench.heard(bench.owner, Drop)
    assert not bench.job.book.moving
    bench.tell(DrainAsked(bench.owner))
    bench.wait(0.1)
    assert bench.heard(bench.owner, Stop)


def test_an_aggregator_that_did_not_hear_its_order_is_asked_again_when_it_is_back() -> None:
    bench = Small("one")
    bench.at(5)
    bench.kill_worker()
    bench.come_again("b")
    bench.answer("one", {0: 5, 1: 5})
    bench.unlink("one")  # before it has heard of `Host`
    bench.wait(0.2)
    bench.register("one")
    assert bench.heard("one", Hold)[-1].epoch == 3
    bench.answer("one", {0: 5, 1: 5})
    bench.say("one", Ready("lm", 3, (BlockState(0, 5), BlockState(1, 5))))
    assert bench.heard("lm", Placement)[-1].applied == 5
    assert bench.job.book.lost == 0


def test_who_answers_late_keeps_its_blocks() -> None:
    bench = Small("one", snapshot_every=0)
    bench.at(5)
    bench.kill_worker()
    bench.come_again("b")
    bench.answer("one", {0: 5, 1: 5})
    bench.wait(2.5)  # it is busy and not ready in time
    bench.answer("one", {0: 5, 1: 5})
    epoch = bench.job.book.epoch
    bench.say("one", Ready("lm", epoch, (BlockState(0, 5), BlockState(1, 5))))
    bench.wait(0.1)
    assert bench.job.failed is None
    assert bench.job.book.placed.epoch == bench.job.book.epoch == epoch
    assert not bench.heard("one", Complete)


def test_first_parameters_that_were_interrupted_are_brought_again() -> None:
    bench = Small("one", snapshot_every=0)
    bench.kill_worker()
    bench.come_again("b")
    bench.answer("one", {0: 0}, empty=(1,))
    placement = bench.heard("lm", Placement)[-1]
    assert (placement.epoch, placement.applied, placement.initialise) == (2, 0, True)


def test_blocks_that_are_nowhere_are_not_taken_for_empty_ones() -> None:
    bench = Small("one", snapshot_every=0)
    bench.kill_worker()
    bench.come_again("b")
    bench.answer("one", {0: 0})
    assert "no snapshots are taken" in bench.job.failed


def test_an_aggregator_that_stays_away_while_the_job_stands_still_is_left_behind() -> None:
    bench = Small("one", "two")
    bench.snapshot(50)
    bench.at(60)
    bench.unlink(bench.owner)
    bench.wait(29.0)
    assert bench.job.book.epoch == 1
    bench.wait(2.0)
    (other,) = {"one", "two"} - {bench.owner}
    assert bench.heard(other, Host)[-1].source == SNAPSHOT.format(50, 1)


def test_an_aggregator_that_stays_away_is_waited_for_while_the_job_goes_on_or_has_no_snapshot() -> None:
    going, lone = Small("one", "two"), Small("one", "two")
    going.snapshot(50)
    for bench in (going, lone):
        bench.unlink(bench.owner)
    for step in range(51, 100):
        going.at(step)
        going.wait(2.0)
    lone.wait(100.0)
    assert going.job.book.epoch == lone.job.book.epoch == 1


def test_an_idle_job_keeps_its_last_step_when_its_memory_is_taken() -> None:
    bench = Small("one")
    bench.snapshot(50)
    bench.at(60)
    bench.say("lm", Leave("lm", 0, 62))
    bench.wait(1.0)
    assert bench.heard("one", Keep) == [Keep("lm", 1)]  # at once: nobody may come back
    bench.wait(601.0)
    assert bench.heard("one", Keep) == [Keep("lm", 1)] * 2  # it was not saved
    assert not bench.heard("one", Drop)
    bench.say("one", Saved("lm", "", 62, SNAPSHOT.format(62, 1), (0, 1)))
    bench.snapshot(62)
    bench.wait(0.1)
    assert bench.heard("one", Drop)
    assert bench.job.book.placed is None
    bench.job.step = 0  # as a master that began anew knows it
    shown = job_view(bench.master, bench.job)
    assert (shown["step"], shown["reason"]) == (62, "0 of 1 workers have come")
    with pytest.raises(BadRequest, match="waits for its workers"):
        bench.tell(MoveAsked("lm", (0,), "one"))
    bench.come_again("b")
    assert bench.heard("one", Host)[-1].source == SNAPSHOT.format(62, 1)


def test_an_idle_job_whose_last_step_cannot_be_saved_is_dropped_all_the_same() -> None:
    bench = Small("one")
    bench.snapshot(50)
    bench.say("lm", Leave("lm", 0, 62))
    bench.wait(1.0)
    bench.wait(601.0)
    bench.wait(3.0)
    assert bench.heard("one", Drop)


def test_an_idle_job_of_which_an_aggregator_is_dead_gives_the_others_their_memory_back() -> None:
    bench = Small("one", "two")
    bench.snapshot(50)
    bench.at(50)
    (other,) = {"one", "two"} - {bench.owner}
    bench.tell(MoveAsked("lm", (0,), other))
    bench.say(bench.owner, MovedOut("lm", 1, (0,), other, 50))
    bench.say("lm", Leave("lm", 0, 50))
    bench.wait(1.0)
    bench.unlink(other)
    bench.wait(601.0)
    assert not bench.heard(bench.owner, Drop)  # it may only be away
    bench.tell(Exited(other))
    bench.wait(0.1)
    assert bench.heard(bench.owner, Drop)


def test_an_idle_job_of_which_nothing_lasts_gives_its_memory_back() -> None:
    bench = Bench(starts=False, maximum=4)
    bench.register("one")
    bench.links["lm"] = 7
    bench.say("lm", enlist(msgspec.structs.replace(job_spec(blocks=2), optimizer="sum")))
    bench.say("lm", Leave("lm", 0, 5))
    bench.wait(1.0)
    bench.wait(601.0)
    assert bench.heard("one", Drop)
    bench.say("lm", enlist(bench.master.state.jobs["lm"].book.spec, incarnation="b"))
    assert bench.heard("lm", Placement)[-1].initialise


def test_blocks_of_an_idle_job_are_nowhere_when_their_aggregator_is_dead() -> None:
    bench = Small("one")
    assert job_view(bench.master, bench.job)["aggregators"] == {"one": 2}
    bench.kill_worker()
    bench.tell(Exited("one"))
    for again in (False, True):
        if again:  # another one gets its name
            bench.register("one", pid=7)
            bench.say("one", Usage("one", 1.0, 0.0, 0.0, 0, ()))
            assert aggregator_view(bench.master, bench.master.state.aggregators["one"])["jobs"] == {}
        shown = job_view(bench.master, bench.job)
        assert (shown["state"], shown["aggregators"], shown["blocks_nowhere"]) == ("idle", {}, 2)
    bench.register("two", pid=8)
    bench.job.book.placed = msgspec.structs.replace(bench.job.book.placed, owners=("gone", "gone"))
    with pytest.raises(BadRequest, match="in no aggregator's memory"):
        bench.tell(MoveAsked("lm", (0,), "two"))
