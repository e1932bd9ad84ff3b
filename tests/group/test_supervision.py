from __future__ import annotations

import signal

import pytest

from computron.group.supervision import (
    CANNOT_START,
    FOLLOWING,
    KILLING,
    LEAVING,
    PAUSES,
    REPEATED,
    STEADY,
    Asked,
    Beat,
    Died,
    Event,
    HeartbeatClosed,
    Order,
    Send,
    Start,
    Supervision,
    Tick,
    Told,
)

TIMEOUT, DRAIN = 10.0, 30.0
TERM, KILL = signal.SIGTERM, signal.SIGKILL


class Host:
    """A supervision whose clock the test turns, second by second as the supervisor does."""

    def __init__(self, *ranks: int) -> None:
        self.supervision = Supervision(ranks, TIMEOUT, DRAIN)
        self.now = 100.0
        self.orders: list[Order] = []
        self.beating: set[int] = set()
        self.handle(Tick())

    def handle(self, event: Event) -> list[Order]:
        orders = self.supervision.handle(event, self.now)
        self.orders += orders
        return orders

    def pass_time(self, seconds: float) -> list[Order]:
        """The orders of that time, in which the nodes of `beating` beat."""
        orders: list[Order] = []
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + self.supervision.tick)
            for rank in self.beating:
                orders += self.handle(Beat(rank))
            orders += self.handle(Tick())
        return orders

    def signals(self) -> list[tuple[int, int]]:
        return [(order.rank, order.signal) for order in self.orders if isinstance(order, Send)]

    @property
    def result(self) -> int | None:
        return self.supervision.result


def test_all_nodes_are_started_at_once():
    assert Host(2, 3).orders == [Start(2, 0), Start(3, 0)]


def test_a_node_that_keeps_dying_is_started_after_longer_and_longer_pauses():
    host = Host(0, 1)
    seen = []
    for _ in range(len(PAUSES) + 2):
        (told, *started) = host.handle(Died(1, -KILL))
        assert isinstance(told, Told)
        seen.append(told.pause)
        if not started:
            assert not host.pass_time((told.pause or 0) - 0.5)
            started = host.pass_time(1.0)
        assert started == [Start(1, len(seen))]
    assert seen == [*PAUSES, PAUSES[-1], PAUSES[-1]]


def test_a_steady_life_makes_earlier_deaths_forgotten():
    host = Host(0, 1)
    for _ in range(4):
        host.handle(Died(1, 1))
        host.pass_time(PAUSES[-1])
    host.pass_time(STEADY)
    assert Start(1, 5) in host.handle(Died(1, 1))


def test_a_dead_leader_is_started_again_and_the_others_stay():
    host = Host(0, 1, 2)
    assert host.handle(Died(0, -signal.SIGSEGV)) == [Told("died", 0, -signal.SIGSEGV, 0.0), Start(0, 1)]
    assert not host.signals()


def test_a_node_that_falls_silent_is_killed_once_and_started_again():
    host = Host(0, 1)
    host.beating = {0, 1}
    assert not host.pass_time(30)
    host.beating = {0}
    assert host.pass_time(TIMEOUT + 2) == [Told("hung", 1), Send(1, KILL)]
    assert not host.pass_time(30)  # a process that cannot be killed yet
    assert Start(1, 1) in host.handle(Died(1, -KILL))


def test_a_node_may_take_any_time_until_its_first_beat():
    host = Host(0, 1)
    assert not host.pass_time(1000)
    host.handle(Beat(1))
    host.handle(Died(1, 1))
    assert not host.pass_time(1000)  # nor is a new process judged by the beats of the old one


def test_a_node_that_is_ending_has_more_time():
    host = Host(0)
    host.handle(Beat(0))
    host.handle(HeartbeatClosed(0))
    assert not host.pass_time(LEAVING - 1)
    assert host.pass_time(2) == [Told("hung", 0), Send(0, KILL)]


def test_nobody_is_killed_for_the_time_in_which_the_supervisor_was_stopped():
    host = Host(0, 1)
    host.handle(Beat(0))
    host.handle(Beat(1))
    host.now += 1000
    assert not host.handle(Tick())
    host.beating = {0}
    assert not host.pass_time(TIMEOUT - 1)
    assert host.pass_time(2) == [Told("hung", 1), Send(1, KILL)]


def test_a_leader_that_ends_well_ends_the_launch():
    host = Host(0, 1)
    host.handle(Died(0, 0))
    assert host.result is None
    host.handle(Died(1, 0))
    assert host.result == 0
    assert not host.signals()


def test_nodes_that_stay_after_their_leader_are_terminated_then_killed():
    host = Host(0, 1)
    host.handle(Died(0, 0))
    host.pass_time(FOLLOWING + 1)
    assert host.signals() == [(1, TERM)]
    host.pass_time(KILLING)
    assert host.signals() == [(1, TERM), (1, KILL)]
    host.handle(Died(1, -KILL))
    assert host.result == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_can_never_start_ends_the_launch(rank):
    host = Host(0, 1)
    host.handle(Died(rank, CANNOT_START))
    other = 1 - rank
    assert host.signals() == [(other, TERM)]
    host.handle(Died(other, 128 + TERM))
    assert host.result == CANNOT_START


def test_a_host_without_the_leader_ends_when_all_its_nodes_were_told_to():
    host = Host(2, 3)
    host.handle(Died(2, 0))
    assert host.result is None
    host.handle(Died(3, 0))
    assert host.result == 0


def test_a_node_that_ends_well_alone_is_started_again():
    host = Host(0, 1)
    assert host.handle(Died(1, 0)) == [Told("died", 1, 0, FOLLOWING)]
    assert host.pass_time(FOLLOWING) == [Start(1, 1)]


def test_a_request_to_stop_goes_to_the_leader_which_tells_the_others():
    host = Host(0, 1)
    host.handle(Asked(TERM))
    assert host.signals() == [(0, TERM)]
    host.handle(Died(1, 0))
    host.handle(Died(0, 0))
    assert host.result == 0
    assert not any(isinstance(order, Start) for order in host.orders[2:])


@pytest.mark.parametrize("code", [-TERM, 128 + TERM])
def test_a_leader_that_was_starting_may_end_by_the_signal(code):
    host = Host(0)
    host.handle(Asked(signal.SIGINT))
    host.handle(Died(0, code))
    assert host.result == 0


def test_a_leader_that_fails_while_it_stops_makes_the_launch_fail():
    host = Host(0, 1)
    host.handle(Asked(TERM))
    host.handle(Died(0, 1))
    host.pass_time(FOLLOWING + 1)
    assert host.signals() == [(0, TERM), (1, TERM)]
    host.handle(Died(1, 0))
    assert host.result == 1


def test_a_host_without_the_leader_stops_all_its_nodes():
    host = Host(2, 3)
    host.handle(Asked(TERM))
    assert host.signals() == [(2, TERM), (3, TERM)]


def test_without_a_living_leader_a_stop_goes_to_all():
    host = Host(0, 1)
    host.handle(Died(0, 1))
    host.handle(Died(0, 1))
    host.handle(Asked(TERM))
    assert host.signals() == [(1, TERM)]
    host.handle(Died(1, -TERM))
    assert host.result == 0


def test_a_stop_while_nothing_runs_ends_at_once():
    host = Host(1)
    host.handle(Died(1, 1))
    host.handle(Died(1, 1))
    host.handle(Asked(TERM))
    assert host.result == 0


def test_whoever_is_left_after_the_time_to_drain_is_killed():
    host = Host(0, 1)
    host.handle(Asked(TERM))
    host.pass_time(DRAIN + KILLING - 1)
    assert host.signals() == [(0, TERM)]
    host.pass_time(2)
    assert host.signals() == [(0, TERM), (0, KILL), (1, KILL)]
    host.handle(Died(0, -KILL))
    host.handle(Died(1, -KILL))
    assert host.result == 1


def test_a_request_to_stop_that_is_delivered_twice_counts_once():
    host = Host(0, 1)
    host.handle(Asked(TERM))
    host.now += REPEATED / 2
    host.handle(Asked(TERM))
    assert host.signals() == [(0, TERM)]


def test_the_second_request_to_stop_kills_all():
    host = Host(0, 1)
    host.handle(Asked(TERM))
    host.pass_time(REPEATED)
    host.handle(Asked(signal.SIGINT))
    assert host.signals() == [(0, TERM), (0, KILL), (1, KILL)]
    host.handle(Died(1, -KILL))
    host.handle(Died(0, -KILL))
    assert host.result == 128 + signal.SIGINT
