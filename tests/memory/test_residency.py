from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from computron.memory.residency import OrderRefused, Residency


class Frames:
    """A frame pool of plain numbers that refuses what the device pool refuses."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._owned: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert count <= len(self._free)
        taken, self._free = self._free[:count], self._free[count:]
        self._owned.update(taken)
        return taken

    def release(self, frames) -> None:
        assert self._owned.issuperset(frames), "double free"
        assert len(set(frames)) == len(frames), "double free"
        self._owned.difference_update(frames)
        self._free.extend(frames)


def ledger(frames: int = 8, **images: tuple[int, ...]) -> tuple[Residency, Frames]:
    pool = Frames(frames)
    residency = Residency(pool)
    for image_id, contents in images.items():
        residency.add_image(image_id, contents)
    return residency, pool


def swap(residency: Residency, image_id: str, pages) -> None:
    plan = residency.begin(image_id, pages)
    residency.settle(image_id, {plan.contents[position] for position in plan.moved})


def test_only_missing_contents_take_frames():
    residency, pool = ledger(a=(1, 2, 3), b=(1, 2, 9))
    swap(residency, "a", (0, 1, 2))
    plan = residency.begin("b", (0, 1, 2))
    assert plan.moved == (2,)
    assert plan.frames[:2] == (residency.mapping("a")[0], residency.mapping("a")[1])
    assert pool.free == 4


def test_content_twice_in_one_image_travels_once():
    residency, pool = ledger(a=(7, 7, 7))
    plan = residency.begin("a", (0, 1, 2))
    assert plan.moved == (0,)
    assert len(set(plan.frames)) == 1
    assert pool.free == 7


def test_shared_frame_stays_until_its_last_user_leaves():
    residency, pool = ledger(a=(1, 2), b=(1, 3))
    swap(residency, "a", (0, 1))
    swap(residency, "b", (0, 1))
    residency.evict("a", (0, 1))
    assert pool.free == 6
    residency.evict("b", (0,))
    assert pool.free == 7


def test_cancelled_swap_keeps_what_arrived():
    residency, pool = ledger(a=(1, 2, 3, 1))
    residency.begin("a", (0, 1, 2, 3))
    assert residency.settle("a", {1}) == (1, 2)
    assert residency.resident("a") == {0, 3}
    assert pool.free == 7


def test_failed_swap_keeps_nothing_of_it():
    residency, pool = ledger(a=(1, 2), b=(1, 5))
    swap(residency, "a", (0, 1))
    residency.begin("b", (0, 1))
    assert residency.abandon("b") == (0, 1)
    assert residency.resident("a") == {0, 1}
    assert pool.free == 6


def test_shared_page_outlives_its_first_user_during_another_swap():
    residency, pool = ledger(a=(1,), b=(1, 2))
    swap(residency, "a", (0,))
    residency.begin("b", (0, 1))
    residency.evict("a", (0,))
    residency.abandon("b")
    assert pool.free == 8


@pytest.mark.parametrize(
    ("image_id", "pages", "words"),
    [
        ("a", (0,), "already on the device"),
        ("a", (5,), "has 3 pages"),
        ("a", (1, 1), "cannot take"),
        ("b", (0,), "in flight for c"),
        ("c", (1,), "already under way"),
        ("d", tuple(range(9)), "9 frames and"),
        ("x", (0,), "not registered"),
    ],
)
def test_impossible_swap_is_refused_and_changes_nothing(image_id, pages, words):
    residency, pool = ledger(a=(1, 2, 3), b=(20, 21), c=(20, 22), d=tuple(range(100, 109)))
    swap(residency, "a", (0,))
    residency.begin("c", (0,))
    free = pool.free
    with pytest.raises(OrderRefused, match=words):
        residency.begin(image_id, pages)
    residency.check()
    assert pool.free == free


def test_page_in_flight_cannot_be_evicted():
    residency, _ = ledger(a=(1, 2))
    residency.begin("a", (0, 1))
    with pytest.raises(OrderRefused, match="not resident"):
        residency.evict("a", (0,))


def test_cache_cannot_take_more_than_is_free():
    residency, pool = ledger(frames=4, a=(1, 2))
    swap(residency, "a", (0, 1))
    with pytest.raises(OrderRefused, match="needs 3 more frames and 2 are free"):
        residency.set_cache("a", 3)
    assert len(residency.set_cache("a", 2)) == 2
    assert residency.set_cache("a", 1) == []
    assert pool.free == 1


def test_image_that_holds_memory_cannot_be_removed():
    residency, _ = ledger(a=(1, 2))
    residency.set_cache("a", 1)
    with pytest.raises(OrderRefused, match="still holds"):
        residency.remove_image("a")
    residency.set_cache("a", 0)
    residency.remove_image("a")


IMAGES = {"base": (1, 2, 3, 4, 5, 6), "tuned": (1, 2, 3, 40, 50, 6), "other": (7, 8, 9, 7), "empty": ()}


class Ledger(RuleBasedStateMachine):
    """Random orders against a small pool; a model of sets says what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.residency, self.pool = ledger(frames=9, **IMAGES)
        self.here: dict[str, set[int]] = {image_id: set() for image_id in IMAGES}
        self.plans: dict[str, object] = {}
        self.cache = dict.fromkeys(IMAGES, 0)

    @rule(image_id=st.sampled_from(sorted(IMAGES)), data=st.data())
    def begin(self, image_id, data):
        pages = data.draw(st.lists(st.sampled_from(range(6)), unique=True, max_size=6))
        contents = IMAGES[image_id]
        flying = {c for plan in self.plans.values() for c in plan.contents}
        here = {IMAGES[i][p] for i, pages_here in self.here.items() for p in pages_here} | flying
        arriving = {plan.contents[position] for plan in self.plans.values() for position in plan.moved}
        possible = (
            image_id not in self.plans
            and all(page < len(contents) and page not in self.here[image_id] for page in pages)
            and not arriving & {contents[page] for page in pages}
            and len({contents[page] for page in pages} - here) <= self.pool.free
        )
        if possible:
            self.plans[image_id] = self.residency.begin(image_id, pages)
        else:
            with pytest.raises(OrderRefused):
                self.residency.begin(image_id, pages)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def settle(self, data):
        image_id = data.draw(st.sampled_from(sorted(self.plans)))
        plan = self.plans.pop(image_id)
        moved = [plan.contents[position] for position in plan.moved]
        arrived = set(data.draw(st.lists(st.sampled_from(moved)))) if moved else set()
        dropped = set(self.residency.settle(image_id, arrived))
        lost = set(moved) - arrived
        assert dropped == {p for p, c in zip(plan.pages, plan.contents, strict=True) if c in lost}
        self.here[image_id] |= set(plan.pages) - dropped

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def abandon(self, data):
        image_id = data.draw(st.sampled_from(sorted(self.plans)))
        assert self.residency.abandon(image_id) == self.plans.pop(image_id).pages

    @rule(image_id=st.sampled_from(sorted(IMAGES)), data=st.data())
    def evict(self, image_id, data):
        pages = data.draw(st.lists(st.sampled_from(range(6)), unique=True, max_size=6))
        if self.here[image_id].issuperset(pages):
            self.residency.evict(image_id, pages)
            self.here[image_id].difference_update(pages)
        else:
            with pytest.raises(OrderRefused):
                self.residency.evict(image_id, pages)

    @rule(image_id=st.sampled_from(sorted(IMAGES)), frames=st.integers(0, 4))
    def set_cache(self, image_id, frames):
        if frames - self.cache[image_id] > self.pool.free:
            with pytest.raises(OrderRefused):
                self.residency.set_cache(image_id, frames)
        else:
            added = self.residency.set_cache(image_id, frames)
            assert len(added) == max(0, frames - self.cache[image_id])
            self.cache[image_id] = frames

    @invariant()
    def ledger_is_sound(self):
        self.residency.check()
        contents = {IMAGES[i][p] for i, pages in self.here.items() for p in pages}
        contents |= {c for plan in self.plans.values() for c in plan.contents}
        assert self.pool.free == 9 - len(contents) - sum(self.cache.values())
        for image_id, pages in self.here.items():
            assert self.residency.resident(image_id) == pages

    def teardown(self):
        for image_id in list(self.plans):
            self.residency.abandon(image_id)
        for image_id, pages in self.here.items():
            self.residency.evict(image_id, tuple(pages))
            self.residency.set_cache(image_id, 0)
            self.residency.remove_image(image_id)
        assert self.pool.free == 9


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
