from __future__ import annotations

import threading

from computron.parameter_service.agent.change import Change


def test_who_waits_is_woken_when_it_is_so() -> None:
    change, seen, found = Change(), [], []

    def wait(number: int) -> None:
        with change:
            found.append((number, change.wait(lambda: number in seen, 10.0)))

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in range(3):
        with change:
            seen.append(number)
            change.tell()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(0, True), (1, True), (2, True)]


def test_a_wait_that_ends_says_so_and_is_not_asked_any_more() -> None:
    change, asked = Change(), []

    def never() -> bool:
        asked.append(True)
        return False

    with change:
        assert not change.wait(never, 0.0)
        before = len(asked)
        change.tell()
    assert len(asked) == before
