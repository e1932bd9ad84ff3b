"""Which snapshot a job goes back to, and what of it is given up for good."""

from __future__ import annotations

from computron.parameter_service.master.events import Exited, Finished
from computron.parameter_service.wire.messages import KEEP, BlockState, Failed, Host, Ready
from tests.parameter_service.master.test_endings import SNAPSHOT, Small


class Orphaned(Small):
    """Its aggregator has died at step 60; there are snapshots of the steps 40 and 50. Others are to take the job up."""

    def __init__(self, *others: str) -> None:
        super().__init__("one", *others)
        for step in (40, 50):
            self.snapshot(step)
        self.at(60)
        assert self.owner == "one"
        self.tell(Exited("one"))

    @property
    def source(self) -> str:
        return self.job.change.source

    def fail(self, order: str) -> str:
        """Who was to have the blocks cannot: its name."""
        (name,) = set(self.job.change.owners)
        self.say(name, Failed("lm", self.job.change.epoch, order, f"{self.source}: no"))
        self.wait(0.1)
        if not self.job.change.owners:
            self.answer(name, {})
        self.wait(0.1)
        return name


def test_a_snapshot_that_one_aggregator_cannot_read_is_read_by_another() -> None:
    bench = Orphaned("two", "three")
    first = bench.fail("host")
    assert bench.source == SNAPSHOT.format(50, 1)
    (second,) = set(bench.job.change.owners)
    assert second != first
    assert bench.heard(second, Host)[-1].source == bench.source
    assert len(bench.job.book.snapshots) == 2


def test_a_snapshot_that_the_only_aggregator_cannot_read_is_read_when_it_can() -> None:
    bench = Orphaned("two")
    for _ in range(3):
        bench.fail("host")
        bench.wait(3.0)
        bench.wait(0.1)
        bench.answer("two", {})
        bench.wait(0.1)
    assert bench.job.failed is None
    assert bench.heard("two", Host)[-1].source == SNAPSHOT.format(50, 1)


def test_a_snapshot_is_given_up_when_no_aggregator_finds_it() -> None:
    bench = Orphaned("two", "three")
    bench.fail("find")
    assert bench.source == SNAPSHOT.format(50, 1)
    bench.fail("find")
    assert bench.source == SNAPSHOT.format(40, 1)


def test_a_snapshot_is_not_given_up_while_an_aggregator_that_may_find_it_is_away() -> None:
    bench = Orphaned("two", "three")
    (asked,) = set(bench.job.change.owners)
    (away,) = {"two", "three"} - {asked}
    bench.unlink(away)
    bench.fail("find")
    assert len(bench.job.book.snapshots) == 2
    bench.register(away, {"two": 2, "three": 3}[away])
    bench.wait(0.1)
    assert bench.heard(away, Host)[-1].source == SNAPSHOT.format(50, 1)


def test_a_snapshot_is_given_up_though_an_aggregator_is_away_for_good() -> None:
    bench = Orphaned("two", "three")
    (asked,) = set(bench.job.change.owners)
    (away,) = {"two", "three"} - {asked}
    bench.unlink(away)
    bench.now += 31.0
    bench.say(asked, Failed("lm", bench.job.change.epoch, "find", "it is not there"))
    assert [saved.step for saved in bench.job.book.snapshots] == [40]


def test_a_damaged_snapshot_is_given_up_at_once() -> None:
    bench = Orphaned("two", "three")
    bench.fail("restore")
    assert bench.source == SNAPSHOT.format(40, 1)


def test_what_was_saved_before_a_rollback_is_void_also_if_the_rollback_was_interrupted() -> None:
    bench = Orphaned("two")
    bench.unlink("two")
    bench.register("two", 2)  # its link was broken for a moment, and it has the blocks
    bench.answer("two", {0: 50, 1: 50})
    bench.say("two", Ready("lm", bench.job.change.epoch, (BlockState(0, 50), BlockState(1, 50))))
    assert bench.job.book.placed.applied == 50
    assert (bench.heard("two", Host)[-1].source, bench.heard("two", Host)[-1].history) == (KEEP, 2)
    bench.tell(Finished("lm", "", 55, SNAPSHOT.format(55, 1), 0.0))
    assert [saved.step for saved in bench.job.book.snapshots] == [40, 50]
