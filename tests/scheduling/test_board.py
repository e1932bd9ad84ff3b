"""What the board keeps for later: it is no more than what there is to keep."""

from __future__ import annotations

from driver import Driver
from virtual_device import spec

from computron.scheduling.agenda import Agenda
from computron.scheduling.tuning import Tuning


def board_of(driver: Driver):
    return driver.scheduler._board


def test_far_deadlines_of_answered_requests_do_not_pile_up():
    driver = Driver(4, [spec("a", 2)], step_seconds=0.01)
    for number in range(500):
        driver.arrive(number, "a", 0.02 * number, deadline=10_000.0)
    driver.drain()
    assert set(driver.outcomes.values()) == {"finished"}
    assert len(board_of(driver)._deadlines) <= 20


def test_one_forecast_a_model_is_kept():
    driver = Driver(4, [spec("a", 2), spec("b", 2)], step_seconds=0.01, prefetch=False)
    for number in range(100):
        driver.arrive(number, "ab"[number % 2], 1.0 * number)
    driver.drain()
    assert len(board_of(driver)._foretold) == 2


def test_forecast_leaves_with_its_model():
    driver = Driver(4, [spec("a", 2)], prefetch=False)
    for number in range(5):
        driver.arrive(number, "a", 1.0 * number)
    driver.drain()
    board = board_of(driver)
    assert board.next_foretold()[1] is board.models["a"]
    board.remove_model(board.models["a"])
    assert board.next_foretold() is None


def test_later_request_replaces_the_forecast_of_an_earlier_one():
    driver = Driver(4, [spec("a", 2)], prefetch=False, tuning=Tuning(regular=1.0))
    starts = []
    for number in range(4):
        driver.arrive(number, "a", 1.0 * number)
        driver.run_until(number + 0.5)
        foretold = board_of(driver).next_foretold()
        starts.append(None if foretold is None else foretold[0])
    assert starts[0] is None
    assert starts[2] < starts[3]
    assert len(board_of(driver)._foretold) == 1


def test_empty_queue_keeps_no_request():
    driver = Driver(4, [spec("a", 2)])
    driver.arrive(1, "a")
    driver.drain()
    queue = board_of(driver).models["a"].waiting
    assert (len(queue), queue._ranked, queue._limits) == (0, [], [])


def test_agenda_tells_its_first_key():
    models = [board_of(Driver(4, [spec("a", 2)])).models["a"]]
    agenda = Agenda()
    assert agenda.first_key() is None
    agenda.file(models[0], (3.0,))
    assert agenda.first_key() == (3.0,)
