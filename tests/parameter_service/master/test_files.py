"""When files of a job are finished, and what becomes of those that will not be."""

from __future__ import annotations

from typing import Any

import pytest

from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.master.events import (
    Discard,
    DropAsked,
    Event,
    Exited,
    Finish,
    Finished,
    MoveAsked,
    NotFinished,
    Order,
    Prune,
    Received,
    Send,
    Tick,
)
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.records import Book
from computron.parameter_service.master.scaling import ScalingSettings
from computron.parameter_service.packing import PACKERS
from computron.parameter_service.wire.messages import (
    NO_FOLDER,
    BlockState,
    Failed,
    Held,
    Host,
    Kept,
    Leave,
    MovedOut,
    Ready,
    Register,
    Saved,
    Unpublished,
)
from tests.parameter_service.master.fakes import address_of, enlist, job_spec

AGGREGATORS = {"one": 1, "two": 2}  # and the numbers of their links
WORKER = 3


class Trained:
    """A master with a job of two blocks, which `one` has, and two tensors that are not trained."""

    def __init__(self) -> None:
        self.master = Master(Book(), PACKERS["utilisation"](), ScalingSettings(maximum=2), 0.0)
        self._now = 0.0
        extras = (TensorSpec("mean", (8,), "float32", 0), TensorSpec("count", (), "int64", 0))
        self.spec = job_spec(blocks=2, extras=extras, snapshot_every=10)
        self.come("one", memory=1 << 31)
        self.come("two", memory=1 << 30)
        self.tell(Received(WORKER, enlist(self.spec)))
        assert set(self.job.book.owners) == {"one"}

    @property
    def job(self) -> Any:
        return self.master.state.jobs["lm"]

    def come(self, name: str, memory: int) -> None:
        self.tell(Received(AGGREGATORS[name], Register(address_of(name), "", AGGREGATORS[name], memory, ())))

    def tell(self, event: Event) -> list[Order]:
        self._now += 1.0
        return [*self.master.handle(event, self._now), *self.master.handle(Tick(), self._now)]

    def saved(
        self,
        version: str,
        step: int,
        path: str,
        *blocks: int,
        extras: tuple[int, ...] = (),
        by: int = 1,
        history: int = 1,
    ) -> list[Order]:
        return self.tell(Received(by, Saved("lm", version, step, path, blocks, extras, history if version else 0)))

    def go_back(self) -> list[Order]:
        """`one` dies, and `two` has the blocks as the last snapshot has them."""
        orders = self.tell(Exited("one"))
        applied = self.job.change.applied
        states = tuple(BlockState(block, applied) for block in (0, 1))
        orders += self.tell(Received(2, Ready("lm", self.job.book.epoch, states)))
        assert self.job.book.placed.applied == applied
        return orders


@pytest.fixture
def trained() -> Trained:
    return Trained()


def test_a_version_is_finished_when_all_blocks_and_all_extras_are_there(trained: Trained) -> None:
    told = [
        *trained.saved("v1", 7, "/v1", extras=(0,)),
        *trained.saved("v1", 7, "/v1", 0, 1),
        *trained.saved("v1", 7, "/v1", extras=(0,)),
    ]
    assert not [order for order in told if isinstance(order, Finish)]
    assert Finish("lm", "v1", 7, "/v1", 1, 4) in trained.saved("v1", 7, "/v1", extras=(1,))


def test_a_snapshot_has_no_extras_and_makes_older_ones_needless(trained: Trained) -> None:
    for step in (5, 10, 15):
        assert Finish("lm", "", step, f"/{step}", 0, 2) in trained.saved("", step, f"/{step}", 0, 1)
        orders = trained.tell(Finished("lm", "", step, f"/{step}", 0.0))
    assert Prune("/15", ("/10", "/15")) in orders


def test_a_rollback_discards_versions_that_are_not_complete(trained: Trained) -> None:
    trained.saved("", 5, "/5", 0, 1)
    trained.tell(Finished("lm", "", 5, "/5", 0.0))
    trained.saved("v1", 7, "/v1", 0, 1, extras=(0, 1))
    trained.tell(Finished("lm", "v1", 7, "/v1", 0.0))
    trained.saved("v2", 8, "/v2", 0, extras=(0, 1))
    orders = trained.go_back()
    assert [order for order in orders if isinstance(order, Discard)] == [Discard("/v2", 1)]


def test_workers_hear_of_versions_that_a_rollback_leaves_out_but_not_of_those_whose_steps_come_again(
    trained: Trained,
) -> None:
    trained.saved("", 5, "/5", 0, 1)
    trained.tell(Finished("lm", "", 5, "/5", 0.0))
    for step in (4, 5, 6):
        trained.saved(f"v{step}", step, f"/v{step}", 0)
    orders = trained.go_back()
    sent = [order.message for order in orders if isinstance(order, Send)]
    assert [message.version for message in sent if isinstance(message, Unpublished)] == ["v4", "v5"]
    assert [order.path for order in orders if isinstance(order, Discard)] == ["/v4", "/v5", "/v6"]


def test_what_went_into_a_version_before_a_rollback_does_not_count_after_it(trained: Trained) -> None:
    trained.saved("", 5, "/5", 0, 1)
    trained.tell(Finished("lm", "", 5, "/5", 0.0))
    trained.go_back()
    told = [
        *trained.saved("v1", 7, "/v1", 0, extras=(0, 1), by=2),  # once more: the master was away
        *trained.saved("v1", 7, "/v1", 1, extras=(0, 1), by=2, history=2),
    ]
    assert not [order for order in told if isinstance(order, Finish)]
    assert Finish("lm", "v1", 7, "/v1", 2, 4) in trained.saved("v1", 7, "/v1", 0, by=2, history=2)


def test_a_snapshot_that_was_removed_is_not_finished_again(trained: Trained) -> None:
    paths = [f"/f/lm/snapshot-{step}-1.safetensors" for step in (5, 10, 15)]
    for step, path in zip((5, 10, 15), paths, strict=True):
        trained.saved("", step, path, 0, 1)
        trained.tell(Finished("lm", "", step, path, 0.0))
    assert not [order for order in trained.saved("", 5, paths[0], 0, 1) if isinstance(order, Finish)]


def test_nothing_of_a_deleted_job_counts_in_a_new_one_of_its_name(trained: Trained) -> None:
    old = "/f/lm/snapshot-0-1.safetensors"
    trained.saved("", 0, old, 0, 1)
    trained.tell(DropAsked("lm"))
    trained.tell(Received(WORKER + 1, enlist(trained.spec)))
    assert trained.job.book.placed.epoch == 2
    trained.tell(Finished("lm", "", 0, old, 0.0))  # it was found in the folder
    assert not trained.job.book.snapshots
    trained.tell(Finished("lm", "", 0, "/f/lm/snapshot-0-2.safetensors", 0.0))
    assert [saved.path for saved in trained.job.book.snapshots] == ["/f/lm/snapshot-0-2.safetensors"]


def test_epochs_of_a_name_go_on_however_many_others_were_deleted_since(trained: Trained) -> None:
    trained.tell(DropAsked("lm"))
    trained.master.state.book.dropped.clear()
    trained.tell(Received(WORKER + 1, enlist(trained.spec)))
    assert trained.job.book.placed.epoch == 2


def kept(orders: list[Order]) -> list[tuple[int, int | None]]:
    """Which links hear of what step."""
    sent = [order for order in orders if isinstance(order, Send)]
    return [(order.link, order.message.step) for order in sent if isinstance(order.message, Kept)]


def hosted(orders: list[Order]) -> list[Host]:
    sent = [order.message for order in orders if isinstance(order, Send)]
    return [message for message in sent if isinstance(message, Host)]


def test_all_aggregators_hear_that_no_snapshot_can_be_written_and_when_one_can_again(trained: Trained) -> None:
    trained.tell(MoveAsked("lm", (1,), "two"))
    failed = Received(1, Failed("lm", 1, "save", "the disk is full", 7))
    assert kept(trained.tell(failed)) == [(1, None), (2, None)]
    assert kept(trained.tell(Finished("lm", "", 5, "/lm/snapshot-5-1.safetensors", 0.0))) == []
    assert kept(trained.tell(Finished("lm", "", 10, "/lm/snapshot-10-1.safetensors", 0.0))) == [(1, 10), (2, 10)]
    unnamed = NotFinished("lm", "", 15, "/lm/snapshot-15-1.safetensors", "it is not there")
    assert kept(trained.tell(unnamed)) == [(1, None), (2, None)]
    assert kept(trained.tell(Received(1, Failed("lm", 1, "publish", "it is there already", 16)))) == []
    assert trained.job.trouble == "it is not there"


@pytest.mark.parametrize("trouble", [None, "the disk is full"])
def test_who_gets_a_job_hears_once_which_snapshot_is_complete(trained: Trained, trouble: str | None) -> None:
    trained.tell(Finished("lm", "", 50, "/lm/snapshot-50-1.safetensors", 0.0))
    if trouble is not None:
        trained.tell(Received(1, Failed("lm", 1, "save", trouble, 60)))
    told = []
    for block in (0, 1):
        trained.tell(MoveAsked("lm", (block,), "two"))
        told.append(kept(trained.tell(Received(1, MovedOut("lm", 1, (block,), "two", 60)))))
    assert told == [[(2, None if trouble else 50)], []]


def test_that_there_is_no_folder_is_told_once_for_each_job(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trained.tell(MoveAsked("lm", (1,), "two"))
    for link in (1, 2, 1):
        assert kept(trained.tell(Received(link, Failed("lm", 1, "save", NO_FOLDER, 5)))) == [(1, None), (2, None)]
    (told,) = [entry for entry in caplog.records if "folder" in entry.getMessage()]
    assert told.levelname == "WARNING"
    assert "--snapshots" in trained.job.trouble


def test_workers_hear_once_of_each_version_that_does_not_come_about(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    def told(*events: Event) -> list[str]:
        sent = [order for event in events for order in trained.tell(event) if isinstance(order, Send)]
        return [order.message.version for order in sent if isinstance(order.message, Unpublished)]

    def failed(version: str, step: int) -> Event:
        return Received(1, Failed("lm", 1, "publish", f"/{version} is there already", step, version, history=1))

    assert told(failed("v1", 3), failed("v1", 3), failed("v1", 4), failed("v2", 4)) == ["v1", "v1", "v2"]
    assert told(NotFinished("lm", "v2", 4, "/v2", "the disk is full", 1)) == []
    assert told(NotFinished("lm", "v3", 5, "/v3", "the disk is full", 1)) == ["v3"]
    assert trained.job.unpublished == "the disk is full"


def test_workers_hear_of_no_version_of_a_deleted_job_or_of_before_a_rollback(trained: Trained) -> None:
    trained.tell(DropAsked("lm"))
    trained.tell(Received(WORKER, enlist(trained.spec)))
    trained.tell(Received(1, Failed("lm", 1, "publish", "the disk is full", 3, "v1")))
    trained.tell(NotFinished("lm", "v2", 3, "/v2", "it was discarded", 1))
    assert trained.job.unpublished == ""


def test_what_is_left_of_a_version_that_failed_is_removed(trained: Trained) -> None:
    trained.saved("v1", 3, "/v1", 0, extras=(0, 1))
    failed = Received(1, Failed("lm", 1, "publish", "the disk is full", 3, "v1", "/v1", 1))
    assert Discard("/v1", 1, 3) in trained.tell(failed)
    assert not trained.job.saving
    assert Discard("/v1", 1, 3) in trained.saved("v1", 3, "/v1", 1)  # another aggregator was late
    assert not trained.job.saving
    assert Finish("lm", "v1", 4, "/v1", 1, 4) in trained.saved("v1", 4, "/v1", 0, 1, extras=(0, 1))


def test_a_version_is_given_up_when_whoever_had_what_is_not_trained_has_gone(trained: Trained) -> None:
    trained.saved("v1", 3, "/v1", 0, 1, extras=(0,))
    trained.tell(Received(WORKER, Leave("lm", 0, 3)))
    trained.tell(Received(WORKER + 1, enlist(trained.spec, incarnation="b")))
    states = tuple(BlockState(block, 3) for block in (0, 1))
    trained.tell(Received(1, Held("lm", 2, states, (), history=1)))
    orders = trained.tell(Received(1, Ready("lm", 2, states)))
    assert trained.job.book.placed.epoch == 2
    trained.saved("v2", 9, "/v2", 0, 1, extras=(0,))  # the new one is about to give the rest
    for _ in range(31):
        orders += trained.tell(Tick())
    assert Discard("/v1", 1, 3) in orders
    told = [order.message for order in orders if isinstance(order, Send)]
    assert [message.version for message in told if isinstance(message, Unpublished)] == ["v1"]


def test_an_epoch_in_which_nothing_was_saved_has_no_limit_but_one_that_goes_back_has(trained: Trained) -> None:
    trained.tell(Finished("lm", "", 0, "/lm/snapshot-0-1.safetensors", 0.0))
    trained.tell(Received(1, Failed("lm", 1, "save", "the disk is full", 5)))
    trained.job.broken = "it begins again"
    trained.tell(Tick())
    assert kept(trained.tell(Received(1, Failed("lm", 1, "save", "of the old epoch", 5)))) == []
    orders = trained.tell(Received(1, Held("lm", 2, (BlockState(0, 7), BlockState(1, 7)), ())))
    assert [host.kept for host in hosted(orders)] == [None]
    assert [host.kept for host in hosted(trained.tell(Exited("one")))] == [0]


def test_a_snapshot_of_what_is_being_given_up_is_never_gone_back_to(trained: Trained) -> None:
    trained.tell(Finished("lm", "", 50, "/lm/snapshot-50-1.safetensors", 0.0))
    trained.tell(MoveAsked("lm", (1,), "two"))
    trained.tell(Received(1, MovedOut("lm", 1, (1,), "two", 50)))
    trained.tell(Exited("two"))
    trained.tell(Received(1, Held("lm", 2, (BlockState(0, 62),), ())))
    again = Book()
    for record in trained.master.state.book.records():
        again.apply(record)
    assert not again.jobs["lm"].counts(60, 1)  # nor for a master that is started now
    assert kept(trained.tell(Finished("lm", "", 60, "/lm/snapshot-60-1.safetensors", 0.0))) == []
    trained.tell(Received(1, Ready("lm", 2, (BlockState(0, 50), BlockState(1, 50)))))
    assert trained.job.book.placed.applied == 50
    trained.tell(Received(4, Register(address_of("three"), "", 4, 1 << 31, ())))
    (host,) = hosted(trained.tell(Exited("one")))
    assert (host.source, host.applied, host.kept) == ("/lm/snapshot-50-1.safetensors", 50, 50)


def test_a_job_that_is_deleted_leaves_no_half_versions(trained: Trained) -> None:
    trained.saved("v1", 7, "/v1", 0)
    assert Discard("/v1", 1) in trained.tell(DropAsked("lm"))
