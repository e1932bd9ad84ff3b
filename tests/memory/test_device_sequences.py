"""Random orders to a real device of the host backend: whatever happens, what is resident equals its source."""

from __future__ import annotations

import contextlib
import random
import select
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from computron import _transfer
from computron.errors import SwapFailed
from computron.memory.host_store import HostStore
from computron.memory.images import FileExtent
from computron.memory.residency import OrderRefused
from computron.memory.swapper import Swapper

PAGE = 16 << 10
FRAMES = 9
SLOTS = 7
IMAGES = ("base", "tuned", "file", "random")
# What is resident depends on timing and must not steer what is drawn, so any page may be drawn at any time.
PAGES = st.just(range(5)) | st.lists(st.sampled_from(range(5)), unique=True)


class Source:
    def __init__(self, data: bytes, path: Path | None) -> None:
        self.data, self._path = data, path
        self.nbytes, self.segment_ends = len(data), (PAGE + 5, 3 * PAGE, len(data))
        if path is not None:
            path.write_bytes(data)

    def read_into(self, offset, buffer) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def extents(self, offset, nbytes):
        return None if self._path is None else [FileExtent(offset, nbytes, self._path, offset)]


class Device(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 3), verify=st.booleans(), chunk=st.sampled_from([PAGE, PAGE // 4]))
    def start(self, seed, verify, chunk):
        self.resources = contextlib.ExitStack()
        folder = Path(self.resources.enter_context(tempfile.TemporaryDirectory()))
        rng = random.Random(seed)
        frozen = rng.randbytes(3 * PAGE)
        self.backend = _transfer.host_backend()
        self.store = HostStore(
            self.backend, budget=SLOTS * PAGE, page_bytes=PAGE, load_threads=2, spill_directory=folder
        )
        self.resources.callback(self.store.close)
        self.swapper = Swapper(
            self.backend, self.store, device_memory=FRAMES * PAGE, page_bytes=PAGE, chunk_bytes=chunk, verify=verify
        )
        self.resources.callback(self.swapper.close)
        self.sources = {
            "base": Source(frozen + rng.randbytes(2 * PAGE), folder / "base"),
            "tuned": Source(frozen + rng.randbytes(2 * PAGE), None),
            "file": Source(rng.randbytes(5 * PAGE - 77), folder / "file"),
            "random": Source(rng.randbytes(4 * PAGE), None),
        }
        self.registered = {
            name: self.swapper.register(self.store.add(name, source), cache_bytes=3 * PAGE)
            for name, source in self.sources.items()
        }
        self.resident = {name: set() for name in IMAGES}
        self.under_way = {}
        self.steps = {}  # of each image with a step: the pages that have passed the gate
        self.cache = dict.fromkeys(IMAGES, 0)
        self.poller = select.poll()
        self.poller.register(self.swapper.completions_fd, select.POLLIN)
        self.extra = 0
        self.loading = threading.Thread()

    @rule(name=st.sampled_from(IMAGES), wanted=PAGES, urgency=st.integers(0, 2))
    def swap_in(self, name, wanted, urgency):
        absent = set(range(len(self.registered[name].image.pages))) - self.resident[name]
        pages = [page for page in wanted if page in absent]
        try:
            self.swapper.swap_in(name, pages, urgency)
        except OrderRefused:
            return
        assert name not in self.under_way
        self.under_way[name] = set(pages)

    @rule(name=st.sampled_from(IMAGES))
    def cancel(self, name):
        self.swapper.cancel(name)

    @rule(segment=st.integers(0, 2), name=st.sampled_from(IMAGES))
    def wait_at_the_gate(self, segment, name):
        if name in self.under_way and not self.swapper._verify:  # else it opens in completions(), on this thread
            with contextlib.suppress(SwapFailed):
                self.swapper.gate(name).wait(segment)
                if name in self.steps:
                    last = sum(self.registered[name].image.segments[: segment + 1])
                    here = self.resident[name] | self.under_way[name]
                    self.steps[name] |= {page for page in here if page < last}

    @rule(name=st.sampled_from(IMAGES))
    def begin_step(self, name):
        if name not in self.steps:
            self.swapper.begin_step(name)
            self.steps[name] = set(self.resident[name])

    @rule(name=st.sampled_from(IMAGES))
    def end_step(self, name):
        if name in self.steps:
            del self.steps[name]
            self.swapper.end_step(name)

    @rule()
    def collect(self):
        for outcome in self.swapper.completions():
            assert outcome.image_id not in self.steps or outcome.state == "done"
            ordered = self.under_way.pop(outcome.image_id)
            assert set(outcome.pages) == ordered
            assert set(outcome.arrived) <= ordered
            assert outcome.state != "done" or set(outcome.arrived) == ordered
            if outcome.state == "failed":
                assert "injected" in outcome.error
                assert outcome.arrived == ()
            self.resident[outcome.image_id] |= set(outcome.arrived)

    @rule()
    def finish_one(self):
        for name in list(self.steps):
            self.end_step(name)
        before = len(self.under_way)
        while before and len(self.under_way) == before:
            assert self.poller.poll(30_000)
            self.collect()

    @rule(operation=st.sampled_from(["copy", "copy", "map"]), after=st.integers(0, 6))
    def break_the_link(self, operation, after):
        self.backend.inject_fault(operation, after, "injected")

    @rule(name=st.sampled_from(IMAGES), unwanted=PAGES)
    def evict(self, name, unwanted):
        pages = [page for page in unwanted if page in self.resident[name]]
        if name in self.steps:
            with pytest.raises(OrderRefused):
                self.swapper.evict(name, pages)
            return
        self.swapper.evict(name, pages)
        self.resident[name] -= set(pages)

    @rule(name=st.sampled_from(IMAGES), frames=st.integers(0, 3))
    def set_cache(self, name, frames):
        try:
            self.swapper.set_cache(name, frames)
        except (OrderRefused, SwapFailed):
            return
        view = torch.from_dlpack(self.registered[name].cache.dlpack())
        for frame in range(self.cache[name], frames):
            view[frame * PAGE : (frame + 1) * PAGE] = self.mark(name, frame)
        self.cache[name] = frames

    @rule()
    def press_on_the_host_budget(self):
        """Load and forget another image meanwhile; it may have to wait until swaps let go of their pages."""
        if not self.loading.is_alive():
            self.loading = threading.Thread(target=self.load_another)
            self.loading.start()

    def load_another(self):
        self.extra += 1
        self.store.add("extra", Source(random.Random(self.extra).randbytes(6 * PAGE), None))
        self.store.remove("extra")

    @staticmethod
    def mark(name, frame):
        return IMAGES.index(name) * 10 + frame + 1

    @invariant()
    def device_holds_what_it_should(self):
        if not hasattr(self, "swapper"):
            return
        self.swapper.check()
        assert self.store.statistics().used <= SLOTS * PAGE
        for name, registered in self.registered.items():
            assert self.swapper.resident_pages(name) == self.resident[name]
            view = torch.from_dlpack(registered.parameters.dlpack())
            for page in self.resident[name] | self.steps.get(name, set()):
                expected = self.sources[name].data[page * PAGE : (page + 1) * PAGE]
                assert view[page * PAGE : page * PAGE + len(expected)].numpy().tobytes() == expected
            cache = torch.from_dlpack(registered.cache.dlpack())
            for frame in range(self.cache[name]):
                part = cache[frame * PAGE : (frame + 1) * PAGE]
                assert bool((part == self.mark(name, frame)).all())

    def teardown(self):
        if not hasattr(self, "swapper"):
            return
        self.finish_one()
        while self.under_way:
            self.finish_one()
        if self.loading.ident is not None:
            self.loading.join()
        for name in IMAGES:
            self.swapper.evict(name, tuple(self.resident[name]))
            self.swapper.set_cache(name, 0)
            self.swapper.unregister(name)
        self.swapper.check()
        assert self.swapper.free_frames == FRAMES
        for name in IMAGES:
            self.store.remove(name)
        self.store.check()
        statistics = self.store.statistics()
        assert (statistics.used, statistics.pages, statistics.spilled_pages) == (0, 0, 0)
        self.resources.close()


TestDevice = Device.TestCase
TestDevice.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_device_sequences_are_not_vacuous():
    """The machine can do a swap, lose one and cancel one; otherwise it would prove nothing."""
    machine = Device()
    machine.start(seed=0, verify=False, chunk=PAGE)
    machine.swapper.swap_in("file", range(5), 0)
    machine.under_way["file"] = set(range(5))
    machine.finish_one()
    assert machine.resident["file"] == set(range(5))
    machine.break_the_link("copy", 0)
    machine.swapper.swap_in("random", range(4), 0)
    machine.under_way["random"] = set(range(4))
    machine.finish_one()
    assert machine.resident["random"] == set()
    machine.device_holds_what_it_should()
    with pytest.raises(OrderRefused):
        machine.swapper.swap_in("base", range(5), 0)
    machine.teardown()
