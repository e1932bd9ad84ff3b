"""When the device computed, of steps that follow each other and of steps in different stages at once."""

from __future__ import annotations

import pytest

from computron.node.busy import BusyClock, computing, union


def test_a_step_computes_but_for_its_waits():
    assert computing(1.0, 9.0, [(2.0, 3.0), (5.0, 6.0)]) == [(1.0, 2.0), (3.0, 5.0), (6.0, 9.0)]
    assert computing(1.0, 3.0, [(1.0, 2.0), (2.0, 3.0)]) == []


def test_intervals_that_meet_are_one():
    assert union([(4.0, 5.0), (1.0, 3.0), (2.0, 3.5), (3.5, 4.0), (7.0, 8.0)]) == [(1.0, 5.0), (7.0, 8.0)]


def test_time_in_which_several_steps_compute_counts_once():
    clock = BusyClock()
    clock.add([(0.0, 2.0)])
    clock.add([(1.0, 3.0)])
    assert clock.hidden_share(0.0, 4.0) == pytest.approx(0.75)
    assert clock.hidden_share(0.0, 4.0, [(2.5, 3.5)]) == pytest.approx(0.875)


def test_a_step_that_began_first_and_ended_last_hides_none_of_the_others():
    clock = BusyClock()
    clock.add([(5.0, 6.0)])
    clock.add([(7.0, 7.5)])
    clock.add([(0.0, 1.0), (8.0, 9.0)])
    assert clock.hidden_share(0.0, 10.0) == pytest.approx(0.35)
    assert clock.hidden_share(5.5, 6.5) == pytest.approx(0.5)


def test_a_swap_that_took_no_time_is_hidden():
    assert BusyClock().hidden_share(1.0, 1.0) == 1.0
