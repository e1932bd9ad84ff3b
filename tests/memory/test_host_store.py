from __future__ import annotations

import threading

import pytest

from computron import _transfer
from computron.errors import OutOfMemory


def test_image_is_stored_byte_for_byte(make_store, sources, read_image):
    store = make_store(8)
    source = sources.file(4.3, seed=1)
    image = store.add("a", source)
    assert image.nbytes == source.nbytes
    assert image.page_sizes == (sources.page,) * 4 + (source.nbytes - 4 * sources.page,)
    assert read_image(store, image) == source.data


def test_page_that_two_segments_touch_belongs_to_the_first(make_store, sources):
    page = sources.page
    ends = (page // 2, page // 2 + 10, 2 * page + 5, 3 * page, 4 * page)
    image = make_store(8).add("a", sources.random(4, seed=1, segment_ends=ends))
    assert image.segments == (1, 0, 2, 0, 1)


def test_equal_pages_are_stored_once(make_store, sources):
    store = make_store(16)
    base = sources.data(6, seed=1)
    tuned = base[: 4 * sources.page] + sources.data(2, seed=2)
    first = store.add("base", sources.in_memory(base))
    second = store.add("tuned", sources.in_memory(tuned))
    assert second.pages[:4] == first.pages[:4]
    assert len({*first.pages, *second.pages}) == 8
    statistics = store.statistics()
    assert statistics.shared_pages == 4
    assert statistics.shared_bytes_saved == 4 * sources.page
    assert statistics.pages == 8
    assert statistics.used == 8 * sources.page


def test_equal_pages_of_one_image_are_one_content(make_store, sources):
    store = make_store(8)
    data = sources.data(1, seed=1)
    image = store.add("a", sources.in_memory(data * 5))
    assert len(set(image.pages)) == 1
    assert store.statistics().used == sources.page


def test_shared_pages_are_the_places_that_need_no_storage(make_store, sources):
    store = make_store(8)
    page = sources.data(1, seed=1)
    made = {"a": page * 3, "b": page * 2 + sources.data(0.5, seed=2), "c": sources.data(0.5, seed=2)}
    seen = []
    for name, data in made.items():
        store.add(name, sources.in_memory(data))
        seen.append((store.statistics().shared_pages, store.statistics().shared_bytes_saved))
        store.check()
    for name in made:
        store.remove(name)
        seen.append((store.statistics().shared_pages, store.statistics().shared_bytes_saved))
        store.check()
    whole, half = sources.page, sources.page // 2
    assert seen[:3] == [(2, 2 * whole), (4, 4 * whole), (5, 4 * whole + half)]
    assert seen[3:] == [(2, whole + half), (0, 0), (0, 0)]


def test_page_of_other_size_is_another_content(make_store, sources):
    store = make_store(8)
    data = bytes(sources.page)
    whole = store.add("a", sources.in_memory(data))
    part = store.add("b", sources.in_memory(data[:-8]))
    assert whole.pages != part.pages


def test_colliding_digests_do_not_merge_different_bytes(make_store, sources, monkeypatch, read_image):
    monkeypatch.setattr(_transfer, "page_digest", lambda address, nbytes: bytes(16))
    store = make_store(8)
    first, second = sources.random(2, seed=1), sources.random(2, seed=2)
    images = [store.add("a", first), store.add("b", second), store.add("c", sources.in_memory(second.data))]
    assert len({*images[0].pages, *images[1].pages}) == 4
    assert images[2].pages == images[1].pages
    assert read_image(store, images[1]) == second.data


def test_removed_image_frees_only_what_no_other_has(make_store, sources, read_image):
    store = make_store(16)
    shared = sources.data(3, seed=1)
    store.add("a", sources.in_memory(shared + sources.data(2, seed=2)))
    image = store.add("b", sources.in_memory(shared + sources.data(1, seed=3)))
    store.remove("a")
    assert store.statistics().used == 4 * sources.page
    assert read_image(store, image)[: len(shared)] == shared
    store.remove("b")
    assert store.statistics().used == 0
    assert store.statistics().pages == 0


def test_freed_slots_serve_the_next_image(make_store, sources, read_image):
    store = make_store(4)
    for seed in range(6):
        image = store.add("a", source := sources.random(4, seed))
        assert store.statistics().on_disk_pages == 0
        assert read_image(store, image) == source.data
        store.remove("a")


def test_empty_image_has_no_pages(make_store, sources):
    store = make_store(2)
    image = store.add("a", sources.in_memory(b"", segment_ends=(0, 0)))
    assert image.pages == ()
    assert image.segments == (0, 0)


def test_image_id_is_taken_once(make_store, sources):
    store = make_store(4)
    store.add("a", sources.random(1, seed=1))
    with pytest.raises(ValueError, match="already in the host store"):
        store.add("a", sources.random(1, seed=2))


def test_progress_adds_up_to_the_image(make_store, sources):
    store = make_store(8)
    seen = []
    source = sources.random(5.5, seed=1)
    store.add("a", source, seen.append)
    assert sum(seen) == source.nbytes


class Broken:
    """Fails to read from a given offset on."""

    def __init__(self, source, offset: int, error: Exception) -> None:
        self._source, self._offset, self._error = source, offset, error
        self.nbytes, self.segment_ends, self.extents = source.nbytes, source.segment_ends, source.extents

    def read_into(self, offset, buffer) -> None:
        if offset >= self._offset:
            raise self._error
        self._source.read_into(offset, buffer)


@pytest.mark.parametrize("page", [0, 3, 9])
def test_failed_load_leaves_nothing_behind(make_store, sources, page):
    store = make_store(16)
    kept = store.add("kept", sources.file(4, seed=1))
    before = store.statistics()
    broken = Broken(sources.file(10, seed=2), page * sources.page, RuntimeError("cannot read tensor x"))
    with pytest.raises(RuntimeError, match="cannot read tensor x"):
        store.add("a", broken)
    after = store.statistics()
    assert (after.used, after.pages, after.images) == (before.used, before.pages, 1)
    store.check()
    assert len(store.add("a", sources.random(10, seed=2)).pages) == 10
    assert len(kept.pages) == 4


def test_failed_load_keeps_pages_that_it_shared(make_store, sources, read_image):
    store = make_store(16)
    data = sources.data(4, seed=1)
    image = store.add("kept", sources.in_memory(data))
    with pytest.raises(RuntimeError, match="no"):
        store.add("a", Broken(sources.in_memory(data + sources.data(4, 2)), 6 * sources.page, RuntimeError("no")))
    assert read_image(store, image) == data


def test_failing_progress_fails_the_load(make_store, sources):
    store = make_store(8)

    def progress(nbytes: int) -> None:
        raise RuntimeError("nobody watches")

    with pytest.raises(RuntimeError, match="nobody watches"):
        store.add("a", sources.random(4, seed=1), progress)
    assert store.statistics().used == 0


def test_images_are_added_side_by_side(make_store, sources, read_image):
    store = make_store(64, load_threads=4)
    shared = sources.data(4, seed=0)
    made = [sources.in_memory(shared + sources.data(4, seed)) for seed in range(1, 7)]
    images = {}

    def add(number: int) -> None:
        images[number] = store.add(f"m{number}", made[number])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, source in enumerate(made):
        assert read_image(store, images[number]) == source.data
        assert images[number].pages[:4] == images[0].pages[:4]
    assert store.statistics().pages == 4 + 6 * 4


def test_budget_below_one_page_is_refused(make_store):
    with pytest.raises(OutOfMemory, match="less than one page"):
        make_store(0)


def test_close_ends_a_load_that_is_under_way(make_store, sources):
    store = make_store(2, load_threads=1)
    held = sources.held(sources.random(8, seed=1))
    errors = []

    def add() -> None:
        try:
            store.add("a", held)
        except RuntimeError as error:
            errors.append(str(error))

    adding = threading.Thread(target=add)
    adding.start()
    closing = threading.Thread(target=store.close)
    closing.start()
    held.go.set()
    adding.join(30)
    closing.join(30)
    assert not adding.is_alive()
    assert not closing.is_alive()
    assert len(errors) == 1
    assert "closed" in errors[0]
