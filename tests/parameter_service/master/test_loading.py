"""A state that workers load is not lost, whoever dies meanwhile."""

from __future__ import annotations

from typing import Any

from computron.parameter_service.master.events import Exited, Finish, Finished, Received, Send, Tick
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.records import Book
from computron.parameter_service.master.scaling import ScalingSettings
from computron.parameter_service.packing import PACKERS
from computron.parameter_service.wire.messages import (
    BlockState,
    Failed,
    Held,
    Hold,
    Host,
    Leave,
    Load,
    Loaded,
    Placement,
    Ready,
    Register,
    Saved,
)
from tests.parameter_service.master.fakes import address_of, enlist, job_spec

AGGREGATORS = {"one": 1, "two": 2}  # and the numbers of their links
WORKERS = {0: 10, 1: 11}
EVERY = 10


class Loading:
    """A master with a job of two blocks and two workers at step 0; its aggregators answer `Hold`."""

    def __init__(self, snapshot_every: int = EVERY) -> None:
        self.now, self.sent = 0.0, []
        self.master = Master(Book(), PACKERS["utilisation"](), ScalingSettings(maximum=2), 0.0)
        for name, link in AGGREGATORS.items():
            self.tell(Received(link, Register(address_of(name), "", link, (3 - link) << 30, ())))
        spec = job_spec(blocks=2, workers=2, snapshot_every=snapshot_every)
        for rank, link in WORKERS.items():
            self.tell(Received(link, enlist(spec, rank, incarnation=str(rank))))
        assert self.heard(WORKERS[0], Placement).epoch == 1

    @property
    def book(self) -> Any:
        return self.master.state.jobs["lm"].book

    def tell(self, event: Any) -> None:
        self.now += 0.1
        orders = [*self.master.handle(event, self.now), *self.master.handle(Tick(), self.now)]
        self.sent += orders
        for order in orders:
            if isinstance(order, Finish):
                self.tell(Finished(order.job, order.version, order.step, order.path, 0.0))
            if isinstance(order, Send) and isinstance(order.message, Hold):
                blocks = tuple(BlockState(i, 0) for i, owner in enumerate(self.book.owners) if owner == self._at(order))
                self.tell(Received(order.link, Held("lm", order.message.epoch, blocks, ())))

    def _at(self, order: Send) -> str:
        return next(name for name, link in AGGREGATORS.items() if link == order.link)

    def heard(self, link: int, kind: type) -> Any:
        found = [o.message for o in self.sent if isinstance(o, Send) and o.link == link and isinstance(o.message, kind)]
        return found[-1] if found else None

    def load(self, *ranks: int, step: int = 0, ready: bool = False) -> None:
        for rank in ranks:
            self.tell(Received(WORKERS[rank], Load("lm", rank, self.book.epoch, 1, step, ready)))

    def snapshot(self, step: int, epoch: int) -> None:
        self.tell(Received(2, Saved("lm", "", step, f"/files/lm/snapshot-{step}-{epoch}.safetensors", (0, 1))))


def test_an_epoch_begins_when_all_members_want_to_load() -> None:
    job = Loading()
    job.snapshot(0, 1)
    job.load(1)
    assert job.book.epoch == 1
    job.load(0)
    placements = [job.heard(link, Placement) for link in WORKERS.values()]
    assert [(p.epoch, p.loads, p.loading, p.initialise) for p in placements] == [
        (2, 1, True, True),
        (2, 1, True, False),
    ]
    host = job.heard(1, Host)
    assert (host.source, host.kept) == ("worker", -EVERY)  # no step before there is a snapshot of it


def test_a_load_is_done_when_there_is_a_snapshot_of_it() -> None:
    job = Loading()
    job.snapshot(0, 1)
    job.load(0, 1)
    job.load(0, ready=True)
    job.snapshot(0, 1)  # of the state before: it does not count any more
    assert job.heard(WORKERS[1], Loaded) is None
    job.snapshot(0, 2)
    assert job.heard(WORKERS[1], Loaded) == Loaded("lm", 1)
    job.tell(Exited("one"))
    assert job.heard(2, Host).source.endswith("snapshot-0-2.safetensors")


def test_a_late_snapshot_of_an_older_epoch_does_not_count() -> None:
    job = Loading()
    job.load(0, 1)
    job.load(0, ready=True)
    job.snapshot(0, 1)
    assert not job.book.snapshots


def test_another_worker_brings_the_state_if_the_first_one_leaves_halfway() -> None:
    job = Loading()
    job.snapshot(0, 1)
    job.load(0, 1)
    job.tell(Received(WORKERS[0], Leave("lm", 0, 0)))
    placement = job.heard(WORKERS[1], Placement)
    assert (placement.epoch, placement.loads, placement.loading, placement.initialise) == (3, 1, True, True)


def test_a_load_that_was_interrupted_is_not_taken_for_done() -> None:
    """The master forgets for a moment who brings it."""
    job = Loading()
    job.snapshot(0, 1)
    job.load(0, 1)
    for worker in job.master.state.jobs["lm"].workers.values():
        worker.load = None
    job.tell(Exited("one"))
    host = job.heard(2, Host)
    assert host.source.endswith("snapshot-0-1.safetensors")
    job.tell(Received(2, Ready("lm", host.epoch, (BlockState(0, 0), BlockState(1, 0)))))
    placement = job.heard(WORKERS[0], Placement)
    assert (placement.epoch, placement.loads, placement.loading) == (3, 0, False)
    job.load(0, 1)
    placement = job.heard(WORKERS[0], Placement)
    assert (placement.epoch, placement.loads, placement.loading) == (4, 1, True)
    for worker in job.master.state.jobs["lm"].workers.values():
        worker.load = None
    job.tell(Received(3, Register(address_of("three"), "", 3, 1 << 30, ())))
    job.tell(Exited("two"))
    assert job.heard(3, Host).source.endswith("snapshot-0-1.safetensors")


def test_it_is_brought_again_if_an_aggregator_dies_before_it_is_done() -> None:
    job = Loading()
    job.snapshot(0, 1)
    job.load(0, 1)
    job.load(0, ready=True)
    job.tell(Exited("one"))
    assert job.heard(2, Host).source == "worker"
    assert job.heard(WORKERS[0], Placement).initialise
    assert job.book.loaded == 0
    job.load(0, ready=True)
    job.snapshot(0, 3)
    assert job.book.loaded == 1


def test_a_version_that_fails_makes_no_load_done() -> None:
    job = Loading()
    job.snapshot(0, 1)
    job.load(0, 1)
    job.tell(Received(1, Failed("lm", 2, "publish", "it is there already", history=2)))
    job.load(0, ready=True)
    assert job.heard(WORKERS[0], Loaded) is None
    job.snapshot(0, 2)
    assert job.heard(WORKERS[0], Loaded) == Loaded("lm", 1)


def test_a_job_that_loaded_what_cannot_be_saved_never_goes_back_before_it() -> None:
    job = Loading()
    job.snapshot(0, 1)
    job.load(0, 1)
    job.load(0, ready=True)
    job.tell(Received(1, Failed("lm", 2, "save", "the disk is full")))
    assert job.heard(WORKERS[0], Loaded) == Loaded("lm", 1)
    job.tell(Exited("one"))
    assert "the disk is full" in job.book.failed


def test_without_snapshots_it_is_done_when_all_blocks_are_there() -> None:
    job = Loading(snapshot_every=0)
    job.load(0, 1)
    job.load(1)
    assert job.heard(WORKERS[0], Loaded) is None
    job.load(1, ready=True)
    assert job.heard(WORKERS[0], Loaded) == Loaded("lm", 1)


def test_the_log_knows_of_loads() -> None:
    job = Loading(snapshot_every=0)
    job.load(0, 1)
    job.load(1, ready=True)
    again = Book()
    for record in job.master.state.book.records():
        again.apply(record)
    assert (again.jobs["lm"].loads, again.jobs["lm"].loaded) == (1, 1)
