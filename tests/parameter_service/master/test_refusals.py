"""What becomes of a job where an aggregator does not take what it is to have, or has not heard of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from computron.parameter_service.layout import Layout
from computron.parameter_service.master.events import Exited, Finished
from computron.parameter_service.specs import block_bytes
from computron.parameter_service.wire.messages import (
    Address,
    BlockState,
    Denied,
    Failed,
    Hold,
    Host,
    HostedJob,
    Leave,
    Load,
    Placement,
    Progress,
    Ready,
    Register,
    Unreachable,
)
from tests.parameter_service.master.fakes import address_of, enlist, job_spec
from tests.parameter_service.master.test_endings import SNAPSHOT, Small
from tests.parameter_service.master.test_scaling import Bench


def loading(*names: str, **fields: Any) -> Small:
    """Step 5, and a state that the worker is to bring."""
    bench = Small(*names, **fields)
    bench.snapshot(0)
    bench.at(5)
    bench.say("lm", Load("lm", 0, 1, 1, 5, False))
    bench.wait(0.1)
    bench.answer(bench.owner, {0: 5, 1: 5})
    assert bench.heard("lm", Placement)[-1].loading
    return bench


def say_unreachable_for_long(bench: Small, address: Address) -> None:
    for _ in range(4):
        bench.say("lm", Unreachable("lm", 0, 1, address, "connection refused"))
        bench.wait(0.5)


@pytest.mark.parametrize("snapshot_every", [0, 10])
def test_a_job_that_an_aggregator_does_not_take_begins_at_another(
    snapshot_every: int, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Small("one", "two", snapshot_every=snapshot_every)
    (other,) = {"one", "two"} - {bench.owner}
    bench.say(bench.owner, Failed("lm", 1, "host", "there is no room"))
    assert any("there is no room" in entry.getMessage() for entry in caplog.records)
    bench.answer(bench.owner, {})
    assert bench.heard(other, Host)[-1].source == "worker"
    assert bench.heard("lm", Placement)[-1].epoch == 2
    assert bench.heard("lm", Placement)[-1].initialise


def test_a_job_that_the_only_aggregator_does_not_take_is_offered_again() -> None:
    bench = Small("one", snapshot_every=0)
    bench.say("one", Failed("lm", 1, "host", "there is no room"))
    bench.answer("one", {})
    for _ in range(3):
        bench.wait(1.0)
    bench.answer("one", {})
    assert len(bench.heard("one", Host)) == 2
    assert not bench.heard("lm", Denied)


def test_a_refusal_of_an_older_placement_changes_nothing() -> None:
    bench = Small("one", "two")
    bench.kill_worker()
    bench.come_again("b")
    bench.answer(bench.owner, {0: 0, 1: 0})
    bench.say(bench.owner, Ready("lm", 2, (BlockState(0, 0), BlockState(1, 0))))
    bench.say(bench.owner, Failed("lm", 1, "host", "there is no room"))
    assert bench.job.book.epoch == 2


def test_no_other_job_is_placed_where_one_is_being_read_from_its_snapshot() -> None:
    spec = job_spec("lm", blocks=2, snapshot_every=10)
    size = sum(block_bytes(spec, block) for block in Layout(spec.tensors, spec.block_elements).blocks)
    bench = Bench(starts=False, maximum=4)
    for pid, name in enumerate(("one", "two"), 1):
        bench.links[name] = 100 + pid
        bench.say(name, Register(address_of(name), "", pid, int(1.2 * size), ()))
    bench.train("lm", snapshot_every=10)
    job = bench.master.state.jobs["lm"]
    (owner,) = set(job.book.owners)
    bench.tell(Finished("lm", "", 0, SNAPSHOT.format(0, 1), 0.0))
    bench.tell(Exited(owner))
    bench.wait(0.1)
    bench.links["other"] = 900
    bench.say("other", enlist(msgspec.structs.replace(spec, job="other")))
    bench.wait(0.1)
    assert not bench.heard("other", Placement)
    (states,) = [tuple(BlockState(block, 0) for block in (0, 1))]
    bench.say(job.change.owners[0], Ready("lm", 2, states))
    assert bench.heard("lm", Placement)[-1].epoch == 2


def test_an_aggregator_that_missed_that_a_state_is_loaded_is_asked_again() -> None:
    bench = loading("one")
    bench.unlink("one")  # before it has heard of `Host`
    bench.wait(0.2)
    book = bench.job.book
    blocks = (BlockState(0, 5), BlockState(1, 5))
    bench.links["one"] = 777
    hosted = HostedJob(book.spec, book.token, 2, (0,), blocks, held=True)
    bench.say("one", Register(address_of("one"), "", 1, 1 << 30, (hosted,)))
    bench.say("lm", Progress("lm", 0, 2, 5, 0.1, 0.1))
    bench.wait(0.1)
    assert bench.heard("one", Hold)[-1].epoch == 3
    bench.answer("one", {0: 5, 1: 5})
    assert bench.heard("one", Host)[-1].source == "worker"


def test_blocks_of_before_a_load_are_not_taken_together_with_loaded_ones() -> None:
    bench = loading("one", snapshot_every=10)
    bench.register("two", 2)
    bench.job.hosts.add("two")
    bench.say("lm", Leave("lm", 0, 5))
    bench.come_again("b")
    bench.answer("one", {0: 5}, history=1)
    bench.answer("two", {1: 5}, history=2)
    assert bench.job.change.source == SNAPSHOT.format(0, 1)


def test_that_another_aggregator_of_the_same_name_has_gone_does_not_count() -> None:
    bench = Small("one", snapshot_every=10)
    bench.snapshot(0)
    bench.at(5)
    before = msgspec.structs.replace(address_of("one"), port=1)
    say_unreachable_for_long(bench, before)
    assert bench.master.state.jobs["lm"].change is None
    say_unreachable_for_long(bench, address_of("one"))
    assert bench.master.state.jobs["lm"].change is not None


def test_an_aggregator_that_once_could_not_be_reached_keeps_a_job_of_long_steps() -> None:
    bench = Small("one", snapshot_every=10)
    bench.snapshot(0)
    bench.at(5)
    bench.say("lm", Unreachable("lm", 0, 1, address_of("one"), "connection refused"))
    bench.wait(5)
    assert bench.master.state.jobs["lm"].change is None
    bench.say("lm", Unreachable("lm", 0, 1, address_of("one"), "connection refused"))  # in the same step, much later
    bench.wait(0.1)
    assert bench.master.state.jobs["lm"].change is None
    bench.at(6)
    bench.say("lm", Unreachable("lm", 0, 1, address_of("one"), "connection refused"))
    bench.wait(0.1)
    assert bench.master.state.jobs["lm"].change is None
