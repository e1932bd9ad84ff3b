"""How many aggregators there are, what is started, drained and stopped; without a clock or a network."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from computron.errors import BadRequest
from computron.parameter_service.master.events import (
    Closed,
    CountAsked,
    DrainAsked,
    Exited,
    Log,
    MoveAsked,
    Order,
    Received,
    Send,
    Start,
    Started,
    Tick,
)
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.records import Book
from computron.parameter_service.master.scaling import ScalingSettings
from computron.parameter_service.packing import PACKERS
from computron.parameter_service.wire.messages import (
    BlockState,
    Failed,
    Held,
    Host,
    JobUsage,
    Move,
    MovedOut,
    Placement,
    Progress,
    Ready,
    Register,
    Stop,
    Usage,
)
from tests.parameter_service.master.fakes import address_of, enlist, job_spec


class Bench:
    """A master with aggregators and workers that are nothing but links."""

    def __init__(self, *, starts: bool = True, book: Book | None = None, **settings: Any) -> None:
        self.now = 0.0
        self.records: list[Any] = []
        self.links: dict[str, int] = {}
        self.jobs: dict[str, int] = {}
        scaling = ScalingSettings(interval=1.0, hysteresis=3.0, starts=starts, **settings)
        self.master = Master(book or Book(), PACKERS["utilisation"](), scaling, 0.0)
        self.sent: list[Send] = []

    def tell(self, event: Any) -> list[Order]:
        orders = self.master.handle(event, self.now)
        self.records += [order.record for order in orders if isinstance(order, Log)]
        self.sent += [order for order in orders if isinstance(order, Send)]
        return orders

    def wait(self, seconds: float = 0.0) -> list[str]:
        """Names of the aggregators that are to be started."""
        self.now += seconds
        return [order.aggregator for order in self.tell(Tick()) if isinstance(order, Start)]

    def begin(self, name: str, pid: int = 1) -> None:
        self.tell(Started(name, pid, 0.0))
        self.register(name, pid)

    def register(self, name: str, pid: int = 1) -> None:
        self.links[name] = 100 + len(self.links)
        self.say(name, Register(address_of(name), "", pid, 1 << 30, ()))

    def say(self, who: str, message: Any) -> None:
        self.tell(Received(self.links[who], message))

    def train(self, job: str, blocks: int = 2, **fields: Any) -> None:
        self.links[job] = 500 + len(self.links)
        self.say(job, enlist(job_spec(job, blocks=blocks, **fields)))
        assert self.heard(job, Placement)

    def heard(self, who: str, kind: type) -> list[Any]:
        messages = [order.message for order in self.sent if order.link == self.links[who]]
        return [message for message in messages if isinstance(message, kind)]

    def report(self, job: str, *, compute: float, wait: float, cpu: float, step: int, behind: float = 10.0) -> None:
        """What the worker and the aggregators measured."""
        state = self.master.state.jobs[job]
        for owner in set(state.book.owners):
            each = tuple((block, cpu) for block, name in enumerate(state.book.owners) if name == owner)
            self.say(owner, Usage(owner, 1.0, 0.5, 0.5, 0, (JobUsage(job, cpu, 1, 0.0, 0, 0, each, behind),)))
        self.say(job, Progress(job, 0, state.book.epoch, step, compute, wait))

    def carry_out_moves(self) -> None:
        for name in [name for name in self.links if name in self.master.state.aggregators]:
            for move in self.heard(name, Move):
                self.say(name, MovedOut(move.job, move.epoch, move.blocks, move.to.aggregator, 5))


def test_as_many_as_wanted_are_started_and_dead_ones_begin_anew() -> None:
    bench = Bench(minimum=2, maximum=4)
    assert bench.wait() == ["aggregator-1", "aggregator-2"]
    assert bench.wait(1.0) == []  # they are on their way
    bench.begin("aggregator-1")
    bench.begin("aggregator-2", 2)
    bench.tell(Exited("aggregator-2"))
    assert bench.wait() == ["aggregator-2"]


def test_one_that_dies_at_once_is_started_again_later_each_time() -> None:
    bench = Bench(minimum=1, maximum=1)
    starts = 0
    for _ in range(100):
        for name in bench.wait(1.0):
            starts += 1
            bench.tell(Exited(name))
    assert 4 <= starts <= 12


def test_another_one_is_started_for_one_that_hangs() -> None:
    bench = Bench(minimum=1, maximum=2)
    bench.begin(*bench.wait())
    bench.tell(Closed(bench.links["aggregator-1"]))
    assert bench.wait(29.0) == []
    assert bench.wait(2.0) == ["aggregator-2"]
    assert bench.wait(60.0) == []  # it is on its way


def test_nothing_is_started_where_somebody_else_does_it() -> None:
    bench = Bench(minimum=2, maximum=4, starts=False)
    assert bench.wait(5.0) == []
    assert bench.master.scaling.wanted == 2


def test_the_wanted_number_can_be_asked_for_within_its_bounds() -> None:
    bench = Bench(minimum=1, maximum=3)
    bench.tell(CountAsked(3))
    assert len(bench.wait()) == 3
    with pytest.raises(BadRequest, match="between 0 and 3"):
        bench.tell(CountAsked(4))
    assert bench.master.scaling.wanted == 3


def test_a_job_that_loses_too_much_gets_another_aggregator_and_is_moved_there() -> None:
    bench = Bench(minimum=1, maximum=3)
    bench.begin(*bench.wait())
    bench.train("a")
    bench.train("b")
    started: list[str] = []
    for step in range(1, 13):
        for job in "ab":
            bench.report(job, compute=0.010, wait=0.050, cpu=0.010, step=step)
        started += bench.wait(1.0)
        for name in started:
            if name not in bench.links:
                bench.begin(name, 2)
        bench.carry_out_moves()
    owners = [set(bench.master.state.jobs[job].book.owners) for job in "ab"]
    assert started == ["aggregator-2"]
    assert owners[0].isdisjoint(owners[1])


def test_a_job_that_lost_too_much_for_a_moment_stays_where_it_is() -> None:
    bench = Bench(minimum=1, maximum=3)
    bench.begin(*bench.wait())
    bench.train("a")
    bench.train("b")
    started: list[str] = []
    waits = [0.020] * 6 + [0.050] * 4 + [0.020] * 6  # for four looks it is the median of five
    for step, wait in enumerate(waits, 1):
        for job in "ab":
            bench.report(job, compute=0.010, wait=wait, cpu=0.010, step=step)
        started += bench.wait(1.0)
    assert started == []


def test_an_aggregator_that_is_not_needed_is_drained_and_stopped_after_a_while() -> None:
    bench = Bench(minimum=1, maximum=3)
    bench.tell(CountAsked(2))
    for pid, name in enumerate(bench.wait(), 1):
        bench.begin(name, pid)
    bench.train("a")
    bench.tell(CountAsked(1))
    idle = ({"aggregator-1", "aggregator-2"} - set(bench.master.state.jobs["a"].book.owners)).pop()
    bench.wait(1.0)
    assert not bench.heard(idle, Stop)  # it might be needed again
    for _ in range(6):
        bench.wait(1.0)
    assert bench.heard(idle, Stop)
    bench.tell(Exited(idle))
    assert bench.wait(5.0) == []


def test_whoever_starts_the_aggregators_also_chooses_which_one_ends() -> None:
    bench = Bench(minimum=1, maximum=3, starts=False)
    bench.tell(CountAsked(2))
    bench.register("one")
    bench.register("two", 2)
    bench.tell(CountAsked(1))
    for _ in range(9):
        bench.wait(1.0)
    assert bench.master.scaling.wanted == 1
    assert not bench.heard("one", Stop)
    assert not bench.heard("two", Stop)
    bench.tell(DrainAsked("two"))
    bench.wait(0.1)
    assert bench.heard("two", Stop)


def test_a_drained_aggregator_gives_its_blocks_away_before_it_stops(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(minimum=2, maximum=2)
    for pid, name in enumerate(bench.wait(), 1):
        bench.begin(name, pid)
    bench.train("a")
    (owner,) = set(bench.master.state.jobs["a"].book.owners)
    bench.tell(DrainAsked(owner))
    bench.wait(0.1)
    (move,) = bench.heard(owner, Move)
    assert not bench.heard(owner, Stop)
    bench.carry_out_moves()
    bench.wait(0.1)
    assert bench.heard(owner, Stop)
    assert set(bench.master.state.jobs["a"].book.owners) == {move.to.aggregator}
    bench.tell(Closed(bench.links[owner]))
    bench.tell(Exited(owner))
    assert owner not in bench.master.state.aggregators
    assert not [entry for entry in caplog.records if entry.levelname == "WARNING"]  # all went as planned


def test_a_move_that_failed_is_tried_again_only_after_a_while() -> None:
    bench = Bench(minimum=2, maximum=2)
    for pid, name in enumerate(bench.wait(), 1):
        bench.begin(name, pid)
    bench.train("a")
    (owner,) = set(bench.master.state.jobs["a"].book.owners)
    bench.tell(DrainAsked(owner))
    bench.wait(0.1)
    (move,) = bench.heard(owner, Move)
    states = tuple(BlockState(block, 0) for block in move.blocks)
    bench.say(owner, Failed("a", 1, "move", "no room"))
    bench.say(move.to.aggregator, Held("a", 2, states[:1], ()))  # one had arrived
    bench.say(owner, Held("a", 2, states, (), (move.blocks[0],)))
    assert [host.blocks for host in bench.heard(move.to.aggregator, Host)] == [move.blocks[:1]]
    bench.say(move.to.aggregator, Ready("a", 2, states[:1]))
    bench.say(owner, Ready("a", 2, states[1:]))
    bench.say(owner, Failed("a", 1, "move", "it comes late"))
    for _ in range(4):
        bench.wait(1.0)
    assert len(bench.heard(owner, Move)) == 1
    for _ in range(4):
        bench.wait(1.0)
    assert [(move.epoch, move.blocks) for move in bench.heard(owner, Move)][1:] == [(2, (states[1].block,))]
    assert set(bench.master.state.jobs["a"].book.owners) == {owner, move.to.aggregator}


def test_a_move_that_does_not_end_stops_no_other_jobs() -> None:
    bench = Bench(minimum=3, maximum=3)
    for pid, name in enumerate(bench.wait(), 1):
        bench.begin(name, pid)
    for job in "abc":
        bench.train(job)
    here, stuck, there = sorted(bench.links.keys() - set("abc"))
    for job in "abc":
        bench.tell(MoveAsked(job, None, stuck if job == "c" else here))
    bench.carry_out_moves()
    bench.tell(MoveAsked("c", None, there))
    bench.sent.clear()
    for step in range(1, 13):
        for job in "ab":
            bench.report(job, compute=0.010, wait=0.050, cpu=0.010, step=step)
        bench.wait(1.0)
    assert {move.job for move in bench.heard(here, Move)} <= {"a", "b"}
    assert bench.heard(here, Move)
    assert not bench.heard(stuck, Move)


def test_the_last_aggregator_is_not_drained() -> None:
    bench = Bench(minimum=1, maximum=2)
    bench.begin(*bench.wait())
    with pytest.raises(BadRequest, match="no other aggregator could take what aggregator-1 has: start another one"):
        bench.tell(DrainAsked("aggregator-1"))


def test_a_job_that_fits_nowhere_makes_room_for_itself() -> None:
    bench = Bench(minimum=0, maximum=2)
    assert bench.wait() == []
    bench.links["a"] = 500
    bench.say("a", enlist(job_spec("a")))
    assert not bench.heard("a", Placement)
    (name,) = bench.wait(0.1)
    bench.begin(name)
    bench.wait(0.1)
    assert bench.heard("a", Placement)


def test_an_aggregator_whose_link_breaks_before_it_has_stopped_is_told_again() -> None:
    bench = Bench(starts=False, maximum=4)
    bench.register("one")
    bench.register("two", 2)
    bench.tell(DrainAsked("two"))
    bench.wait(0.1)
    assert bench.heard("two", Stop)
    bench.tell(Closed(bench.links["two"]))
    bench.register("two", 2)
    assert bench.heard("two", Stop)
    bench.train("lm")
    bench.wait(1.0)
    assert set(bench.master.state.jobs["lm"].book.owners) == {"one"}
    bench.tell(Closed(bench.links["two"]))
    bench.links["two"] = 900
    another = msgspec.structs.replace(address_of("two"), path="/another process, which was started under this name")
    bench.say("two", Register(another, "", 2, 1 << 30, ()))
    bench.wait(0.1)
    assert not bench.heard("two", Stop)
