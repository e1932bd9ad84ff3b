"""Contents that models share: counted one by one from the moment on when the second model with them is known."""

from __future__ import annotations

from collections import Counter

import pytest
from driver import Driver
from hypothesis import given
from hypothesis import strategies as st
from virtual_device import spec

from computron.scheduling.actions import Urgency
from computron.scheduling.events import ModelAdded
from computron.scheduling.ledger import Ledger, Residency

CONTENTS = st.lists(st.integers(0, 12), min_size=1, max_size=6).map(tuple)
FRAMES = 40


def mapped_on(ledger: Ledger, residency: Residency) -> Residency:
    ledger.add(residency)
    ledger.order(residency, residency.unmapped(), Urgency.DEMAND, 0.0, 1.0)
    ledger.finish(residency, tuple(range(len(residency.contents))))
    return residency


def test_model_without_shared_pages_is_counted_as_a_whole():
    ledger = Ledger(8)
    a = mapped_on(ledger, Residency("a", (1, 2, 3)))
    assert a.shared == []
    assert a.last_pages(2) == (2, 1)
    ledger.evict(a, a.last_pages(2))
    assert (ledger.free, a.count, a.unmapped(), a.mapped_pages()) == (7, 1, (1, 2), (0,))
    ledger.check([a])


def test_mapped_pages_are_shared_from_the_moment_on_when_another_model_has_them():
    ledger = Ledger(8)
    a, b = mapped_on(ledger, Residency("a", (1, 2, 3))), Residency("b", (3, 4))
    ledger.add(b)
    assert (a.shared, b.shared) == ([2], [0])
    assert ledger.lacking(b) == 1
    assert ledger.order(b, b.unmapped(), Urgency.DEMAND, 0.0, 1.0).frames == 1
    ledger.evict(a, a.last_pages(1))
    assert ledger.free == 4  # 3 stays for b
    ledger.check([a, b])


def test_pages_on_their_way_are_awaited_by_a_model_that_is_added_meanwhile():
    ledger = Ledger(8)
    a, b = Residency("a", (1, 2, 3)), Residency("b", (4, 2))
    ledger.add(a)
    ledger.order(a, a.unmapped(), Urgency.DEMAND, 0.0, 1.0)
    ledger.add(b)
    assert ledger.awaited(b) is a
    ledger.check([a, b])
    ledger.finish(a, (0,))
    assert ledger.awaited(b) is None
    assert (ledger.free, ledger.lacking(b)) == (7, 2)
    ledger.check([a, b])


def test_pages_with_a_hole_are_told_apart():
    ledger, a = Ledger(8), Residency("a", (1, 2, 3, 4))
    ledger.add(a)
    ledger.order(a, a.unmapped(), Urgency.DEMAND, 0.0, 1.0)
    ledger.finish(a, (0, 3))
    assert (a.mapped_pages(), a.unmapped(), a.last_pages(1)) == ((0, 3), (1, 2), (3,))
    ledger.evict(a, (0,))
    assert (a.mapped_pages(), a.unmapped()) == ((3,), (0, 1, 2))
    ledger.check([a])


def test_content_of_a_removed_model_is_private_again_to_the_next_one():
    ledger, a, b = Ledger(8), Residency("a", (1, 2)), Residency("b", (1, 2))
    ledger.add(a)
    ledger.remove(a)
    ledger.add(b)
    assert b.shared == []
    ledger.check([b])


def test_eviction_of_what_is_not_mapped_is_refused():
    ledger = Ledger(8)
    a = mapped_on(ledger, Residency("a", (1, 2)))
    ledger.evict(a, a.last_pages(1))
    with pytest.raises(AssertionError, match="page 1 of a is not mapped"):
        ledger.evict(a, (1,))


@given(st.data())
def test_ledger_agrees_with_counting_every_frame(data):
    ledger, models = Ledger(FRAMES), []
    for number in range(data.draw(st.integers(1, 30))):
        idle = [model for model in models if model.swap is None]
        action = data.draw(st.sampled_from(["add", "order", "finish", "evict", "evict_last"]))
        if action == "add" and len(models) < 6:
            models.append(Residency(f"m{number}", data.draw(CONTENTS)))
            ledger.add(models[-1])
        elif action == "order" and idle:
            model = data.draw(st.sampled_from(idle))
            if ledger.awaited(model) is None and not model.complete:
                lacking = ledger.lacking(model)
                most = data.draw(st.integers(1, max(1, lacking)))
                pages = ledger.first_lacking(model, most)
                assert pages == model.unmapped()[: len(pages)]
                swap = ledger.order(model, pages, Urgency.DEMAND, 0.0, 1.0)
                assert swap.frames == min(most, lacking)
                assert swap.completing == (len(pages) == len(model.unmapped()))
                assert swap.rest == lacking - swap.frames
        elif action == "finish" and len(idle) < len(models):
            model = data.draw(st.sampled_from([model for model in models if model.swap is not None]))
            pages = model.swap.pages
            came = data.draw(st.just(len(pages)) | st.integers(0, len(pages)))
            ledger.finish(model, pages[:came] if data.draw(st.booleans()) else tuple(reversed(pages))[:came])
        elif action.startswith("evict") and idle:
            model = data.draw(st.sampled_from(idle))
            if action == "evict_last":
                pages = model.last_pages(data.draw(st.integers(0, model.count)))
            else:
                pages = tuple(page for page in model.mapped_pages() if data.draw(st.booleans()))
            ledger.evict(model, pages)
        _check(ledger, models)


def _check(ledger: Ledger, models: list[Residency]) -> None:
    on_the_way = {model.name: model.swap.pages if model.swap is not None else () for model in models}
    held: Counter[int] = Counter()
    for model in models:
        mapped = [page for page in range(len(model.contents)) if model.mapped[page]]
        held.update(model.contents[page] for page in (*mapped, *on_the_way[model.name]))
        assert (model.count, model.mapped_pages()) == (len(mapped), tuple(mapped))
        assert model.last_pages(model.count) == tuple(reversed(mapped))
    assert ledger.free == FRAMES - len(held)
    assert all(ledger.holders(content) == count for content, count in held.items())
    for model in models:
        if model.swap is None:
            assert ledger.lacking(model) == len({model.contents[page] for page in model.unmapped()} - held.keys())
    ledger.check(models)


@pytest.mark.parametrize("added", [0.15, 0.45])
def test_fine_tune_that_is_added_later_shares_what_is_mapped_or_on_its_way(added):
    """The transfer of 0 to 0.4 s is under way, or has ended, when the other models become known."""
    driver = Driver(6, [spec("base", (1, 2, 3, 4)), spec("other", (21, 22, 23))])
    driver.at(added, ModelAdded(spec("tune", (1, 2, 31))))
    driver.at(added, ModelAdded(spec("twice", (4, 41, 41))))
    for number, model in enumerate(("base", "other", "tune", "twice") * 3):
        driver.arrive(number, model, 0.0 if number == 0 else 0.5 + 0.3 * number)
    driver.drain()
    assert set(driver.outcomes.values()) == {"finished"}
