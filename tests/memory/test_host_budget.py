"""What the host store does when not everything fits its budget."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from computron.errors import CheckpointError, OutOfMemory
from computron.memory import disk


def wanted(store, image) -> None:
    """Let the image be the one wanted last."""
    store.release(store.lease(image.id, []), ())


def in_memory(store, image) -> list[int]:
    """The pages of the image that have a slot. Asking a lease would move some."""
    return [page for page, content in enumerate(image.pages) if store._pages._table[content].slot is not None]


def test_budget_is_never_exceeded(make_store, sources, read_image):
    store = make_store(10)
    images = {}
    peak = []
    for seed in range(5):
        made = sources.file(6, seed)
        images[seed] = store.add(f"m{seed}", made, lambda nbytes: peak.append(store.statistics().used)), made
    assert max(peak) <= 10 * sources.page
    assert store.statistics().used == 10 * sources.page
    assert store.statistics().committed <= store.statistics().budget
    assert store.statistics().on_disk_pages == 20
    for image, made in images.values():
        assert read_image(store, image) == made.data
    assert store.statistics().used <= 10 * sources.page


def test_last_pages_of_the_coldest_image_leave_first(make_store, sources):
    store = make_store(12)
    cold = store.add("cold", sources.file(4, seed=1))
    warm = store.add("warm", sources.file(4, seed=2))
    hot = store.add("hot", sources.file(4, seed=3))
    for image in (cold, warm, hot):
        wanted(store, image)
    store.add("new", sources.file(6, seed=4))
    assert in_memory(store, hot) == [0, 1, 2, 3]
    assert in_memory(store, warm) == [0, 1]
    assert in_memory(store, cold) == []


def test_page_shared_with_a_hot_image_stays(make_store, sources):
    store = make_store(8)
    shared = sources.data(2, seed=1)
    cold = store.add("cold", sources.in_memory(shared + sources.data(2, seed=2)))
    hot = store.add("hot", sources.in_memory(shared))
    wanted(store, cold)
    wanted(store, hot)
    store.add("new", sources.file(6, seed=4))
    assert in_memory(store, hot) == [0, 1]
    assert in_memory(store, cold) == [0, 1]


def test_pages_with_a_checkpoint_are_dropped_without_writing(make_store, sources):
    store = make_store(4)
    store.add("a", sources.file(4, seed=1))
    store.add("b", sources.file(4, seed=2))
    assert store.statistics().on_disk_pages == 4
    assert store.statistics().spilled_pages == 0


def test_pages_without_a_checkpoint_are_spilled_and_come_back(make_store, sources, read_image):
    store = make_store(4)
    made = [sources.random(4, seed) for seed in range(3)]
    images = [store.add(f"m{number}", source) for number, source in enumerate(made)]
    assert store.statistics().spilled_pages == 8
    for image, source in zip(images, made, strict=True):
        assert read_image(store, image) == source.data
    store.remove("m0")
    store.remove("m1")
    store.remove("m2")
    assert store.statistics().spilled_pages == 0


def test_spill_slots_are_used_again(make_store, sources, tmp_path):
    store = make_store(2, load_threads=1)
    sizes = set()
    for seed in range(4):
        store.add("a", sources.random(4, seed))
        sizes.add(os.fstat(store._pages._spill.location(0)[0]).st_size)
        store.remove("a")
    assert len(sizes) == 1
    assert list((tmp_path / "spill").iterdir()) == []


def test_image_larger_than_the_budget_loads_and_works_from_disk(make_store, sources, read_image):
    store = make_store(3, load_threads=4)
    for number, source in enumerate([sources.file(12.5, seed=1), sources.random(11, seed=2)]):
        image = store.add(f"m{number}", source)
        assert store.statistics().used == 3 * sources.page
        assert read_image(store, image) == source.data
        assert read_image(store, image) == source.data


def test_page_read_from_disk_is_kept_in_place_of_a_colder_one(make_store, sources, read_image):
    store = make_store(4)
    first = store.add("first", sources.file(4, seed=1))
    second = store.add("second", sources.file(4, seed=2))
    assert in_memory(store, second) == [0, 1, 2, 3]
    read_image(store, first)
    assert in_memory(store, first) == [0, 1, 2, 3]
    assert in_memory(store, second) == []
    read = store.statistics().pages_read_from_disk
    read_image(store, first)
    assert store.statistics().pages_read_from_disk == read


def test_page_that_did_not_arrive_is_not_kept(make_store, sources, read_image):
    store = make_store(4)
    source = sources.file(4, seed=1)
    first = store.add("first", source)
    store.add("second", sources.file(4, seed=2))
    store.release(store.lease("first", first.pages), ())
    store.check()
    assert read_image(store, first) == source.data


def test_pages_of_the_image_itself_are_not_driven_out_by_its_others(make_store, sources, read_image):
    store = make_store(4, load_threads=1)
    image = store.add("big", sources.file(8, seed=1))
    held = in_memory(store, image)
    read_image(store, image)
    assert in_memory(store, image) == held
    assert held[:3] == [0, 1, 2]


def test_cold_page_without_checkpoint_makes_room_once_it_is_written(make_store, sources, read_image):
    store = make_store(4, load_threads=1)
    made = sources.random(4, seed=1)
    first = store.add("first", made)
    second = store.add("second", sources.random(4, seed=2))
    assert in_memory(store, first) == []
    wanted_pages = store.lease("first", first.pages)
    assert wanted_pages.kept == {}
    store.release(wanted_pages, first.pages)
    store.check()  # waits for what is written in the background
    assert store.statistics().spilled_pages == 8
    assert read_image(store, first) == made.data
    assert in_memory(store, first) == [0, 1, 2, 3]
    assert in_memory(store, second) == []
    assert read_image(store, first) == made.data


def test_full_disk_is_a_clear_error_and_leaves_nothing(make_store, sources, monkeypatch, read_image):
    store = make_store(4)
    made = sources.random(4, seed=1)
    image = store.add("a", made)

    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "pwrite", full)
    with pytest.raises(OutOfMemory, match=r"No space left on device.*host\.spill_directory"):
        store.add("b", sources.random(4, seed=2))
    monkeypatch.undo()
    store.check()
    assert store.statistics().images == 1
    assert read_image(store, image) == made.data
    store.add("b", sources.random(4, seed=2))


def test_spill_directory_that_cannot_be_made_is_a_clear_error(make_store, sources, tmp_path):
    (tmp_path / "spill").write_text("a file in the way")
    store = make_store(2)
    store.add("a", sources.random(2, seed=1))
    with pytest.raises(OutOfMemory, match="cannot be written to"):
        store.add("b", sources.random(2, seed=2))


def test_checkpoint_changed_on_disk_is_an_error_not_garbage(make_store, sources, tmp_path):
    store = make_store(4)
    image = store.add("a", sources.file(4, seed=1))
    store.add("b", sources.file(4, seed=2))
    path = tmp_path / "checkpoint-1"
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="checkpoint-1 has changed on disk"):
        store.lease("a", image.pages)
    store.check()


def test_checkpoint_deleted_after_its_pages_left_memory_is_still_read(make_store, sources, tmp_path, read_image):
    store = make_store(4)
    source = sources.file(4, seed=1)
    image = store.add("a", source)
    store.add("b", sources.file(4, seed=2))
    (tmp_path / "checkpoint-1").unlink()
    assert read_image(store, image) == source.data


def test_page_whose_checkpoint_is_gone_is_spilled_instead_of_dropped(make_store, sources, tmp_path, read_image):
    store = make_store(4)
    source = sources.file(4, seed=1)
    image = store.add("a", source)
    (tmp_path / "checkpoint-1").unlink()
    store.add("b", sources.file(4, seed=2))
    assert store.statistics().spilled_pages == 4
    assert read_image(store, image) == source.data


def test_missing_checkpoint_fails_the_load(make_store, sources, tmp_path):
    store = make_store(4)
    source = sources.file(2, seed=1)
    (tmp_path / "checkpoint-1").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-1 cannot be read"):
        store.add("a", source)


def test_page_on_disk_is_shared_with_an_image_that_has_it_too(make_store, sources, read_image):
    store = make_store(4)
    source = sources.file(4, seed=1)
    first = store.add("first", source)
    store.add("other", sources.file(4, seed=2))
    assert in_memory(store, first) == []
    again = store.add("again", sources.in_memory(source.data))
    assert again.pages == first.pages
    store.remove("first")
    assert read_image(store, again) == source.data


def test_page_outlives_the_image_whose_checkpoint_holds_it(make_store, sources, read_image):
    store = make_store(4)
    source = sources.file(4, seed=1)
    store.add("first", source)
    again = store.add("again", sources.in_memory(source.data))
    store.add("other", sources.file(4, seed=2))
    store.remove("first")
    assert read_image(store, again) == source.data


def test_checkpoints_are_closed_with_their_images(make_store, sources):
    store = make_store(4)
    before = len(os.listdir("/proc/self/fd"))
    store.add("a", sources.file(4, seed=1))
    store.add("b", sources.file(4, seed=2))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    store.remove("a")
    store.remove("b")
    assert len(os.listdir("/proc/self/fd")) == before


def test_leased_pages_never_leave_memory(make_store, sources):
    store = make_store(6)
    image = store.add("a", sources.file(4, seed=1))
    lease = store.lease("a", image.pages)
    store.add("b", sources.file(8, seed=2))
    assert in_memory(store, image) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="while a swap reads it"):
        store.remove("a")
    store.release(lease, image.pages)
    store.remove("a")


def test_load_waits_for_pages_in_flight_when_all_slots_are_leased(make_store, sources, read_image):
    store = make_store(4)
    image = store.add("a", sources.file(4, seed=1))
    lease = store.lease("a", image.pages)
    source = sources.file(3, seed=2)
    added = []
    adding = threading.Thread(target=lambda: added.append(store.add("b", source)))
    adding.start()
    store.release(lease, image.pages)
    adding.join(30)
    assert read_image(store, added[0]) == source.data


@pytest.mark.parametrize("damage", ["budget", "slots", "spilled", "shared"])
def test_check_finds_books_that_disagree(make_store, sources, damage):
    store = make_store(4)
    store.add("a", sources.random(6, seed=1))
    store.check()
    pages = store._pages
    with pytest.MonkeyPatch.context() as patch:
        match damage:
            case "budget":
                patch.setattr(store, "_budget", 3 * sources.page)
            case "slots":
                patch.setattr(pages._arena, "_fresh", 5)
            case "spilled":
                patch.setattr(pages._spill, "_slots", 7)
            case "shared":
                patch.setattr(store, "_shared_pages", 1)
        with pytest.raises(AssertionError):
            store.check()
    store.check()
