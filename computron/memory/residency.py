"""Which frame holds what: the ledger of the device's memory. Pure bookkeeping, touches no byte."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class OrderRefused(RuntimeError):
    """An order that contradicts the ledger: a mistake of the caller, never a state of the machine."""


class FramePool(Protocol):
    """What the ledger needs of the device pool."""

    @property
    def free(self) -> int: ...
    def allocate(self, count: int) -> list[int]: ...
    def release(self, frames: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class SwapPlan:
    """What a swap-in does. `frames[i]` is mapped at slot `pages[i]`; `moved` are the positions in `pages` whose
    content travels: one for each content that is not on the device, however often it is mapped."""

    pages: tuple[int, ...]
    contents: tuple[int, ...]
    frames: tuple[int, ...]
    moved: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameCounts:
    free: int
    parameters: int
    cache: int
    arriving: int  # of `parameters`: frames with a transfer under way
    shared: int  # of `parameters`: frames mapped at more than one place


@dataclass(slots=True)
class _Held:
    """A content on the device. `references`: places where its frame is mapped."""

    frame: int
    references: int
    arriving: str | None = None  # the image whose swap brings it


@dataclass(slots=True)
class _Image:
    contents: tuple[int, ...]
    resident: set[int] = field(default_factory=set)
    plan: SwapPlan | None = None
    cache: list[int] = field(default_factory=list)


class Residency:
    """Images, their pages and caches, and the frames they own. Every refusal leaves the ledger as it was.

    Used from one thread, but for `add_image`.
    """

    def __init__(self, pool: FramePool) -> None:
        self._pool = pool
        self._frames = pool.free
        self._images: dict[str, _Image] = {}
        self._held: dict[int, _Held] = {}
        self._cache_frames = 0
        self._arriving = 0
        self._shared = 0

    def add_image(self, image_id: str, contents: Sequence[int]) -> None:
        if image_id in self._images:
            raise OrderRefused(f"{image_id} is already registered")
        self._images[image_id] = _Image(tuple(contents))

    def identify(self, image_id: str, contents: Sequence[int]) -> None:
        """Let the image's pages have these contents. None of them may be on the device."""
        image = self._image(image_id)
        if image.resident or image.plan:
            raise OrderRefused(f"{image_id} cannot be identified anew while pages of it are on the device")
        if len(contents) != len(image.contents):
            raise OrderRefused(f"{image_id} has {len(image.contents)} pages, {len(contents)} were identified")
        image.contents = tuple(contents)

    def remove_image(self, image_id: str) -> None:
        image = self._image(image_id)
        if image.resident or image.plan or image.cache:
            raise OrderRefused(f"{image_id} still holds device memory")
        del self._images[image_id]

    def resident(self, image_id: str) -> frozenset[int]:
        return frozenset(self._image(image_id).resident)

    def missing(self, image_id: str) -> int:
        """How many of its pages are neither on the device nor on their way."""
        image = self._image(image_id)
        return len(image.contents) - len(image.resident) - (len(image.plan.pages) if image.plan else 0)

    def cache_frames(self, image_id: str) -> int:
        return len(self._image(image_id).cache)

    def mapping(self, image_id: str) -> dict[int, int]:
        """Frame at each slot of the image's parameter range, pages of a swap under way included."""
        image = self._image(image_id)
        mapped = {page: self._held[image.contents[page]].frame for page in image.resident}
        if image.plan:
            mapped |= dict(zip(image.plan.pages, image.plan.frames, strict=True))
        return mapped

    def cache_mapping(self, image_id: str) -> list[int]:
        return list(self._image(image_id).cache)

    def begin(self, image_id: str, pages: Sequence[int]) -> SwapPlan:
        """Take frames for the contents that are not on the device and count the references of all."""
        image = self._image(image_id)
        if image.plan:
            raise OrderRefused(f"a swap of {image_id} is already under way")
        self._require_pages(image_id, image, pages)
        missing: dict[int, int] = {}
        for position, page in enumerate(pages):
            if page in image.resident:
                raise OrderRefused(f"page {page} of {image_id} is already on the device")
            content = image.contents[page]
            held = self._held.get(content)
            if held is None:
                missing.setdefault(content, position)
            elif held.arriving is not None:
                raise OrderRefused(f"page {page} of {image_id} is in flight for {held.arriving}")
        free = self._pool.free
        if len(missing) > free:
            raise OrderRefused(f"{image_id} needs {len(missing)} frames and {free} of {self._frames} are free")
        for content, frame in zip(missing, self._pool.allocate(len(missing)), strict=True):
            self._held[content] = _Held(frame, 0, arriving=image_id)
        self._arriving += len(missing)
        contents = tuple(image.contents[page] for page in pages)
        for content in contents:
            held = self._held[content]
            held.references += 1
            self._shared += held.references == 2
        frames = tuple(self._held[content].frame for content in contents)
        image.plan = SwapPlan(tuple(pages), contents, frames, tuple(missing.values()))
        return image.plan

    def settle(self, image_id: str, arrived: Collection[int]) -> tuple[int, ...]:
        """End the image's swap. `arrived`: contents that came; shared ones count without being named.

        Returns the pages that did not come: they hold nothing any more and have to be unmapped.
        """
        image, plan = self._swapping(image_id)
        moved = {plan.contents[position] for position in plan.moved}
        lost = moved.difference(arrived)
        for content in moved - lost:
            self._held[content].arriving = None
            self._arriving -= 1
        dropped = tuple(page for page, content in zip(plan.pages, plan.contents, strict=True) if content in lost)
        image.resident.update(set(plan.pages).difference(dropped))
        image.plan = None
        self._drop([image.contents[page] for page in dropped])
        return dropped

    def abandon(self, image_id: str) -> tuple[int, ...]:
        """End the image's swap with none of its pages resident, the shared ones included. Returns those pages."""
        image, plan = self._swapping(image_id)
        image.plan = None
        self._drop(plan.contents)
        return plan.pages

    def evict(self, image_id: str, pages: Sequence[int]) -> None:
        image = self._image(image_id)
        self._require_pages(image_id, image, pages)
        if absent := [page for page in pages if page not in image.resident]:
            raise OrderRefused(f"pages {absent} of {image_id} cannot leave: they are not resident")
        image.resident.difference_update(pages)
        self._drop([image.contents[page] for page in pages])

    def set_cache(self, image_id: str, frames: int) -> list[int]:
        """Let the cache own exactly `frames` frames. Returns the frames that were added, in slot order."""
        cache = self._image(image_id).cache
        if frames < 0:
            raise OrderRefused(f"{image_id} cannot have {frames} cache frames")
        if frames > len(cache):
            wanted, free = frames - len(cache), self._pool.free
            if wanted > free:
                raise OrderRefused(f"the cache of {image_id} needs {wanted} more frames and {free} are free")
            added = self._pool.allocate(wanted)
            cache.extend(added)
            self._cache_frames += wanted
            return added
        released = cache[frames:]
        del cache[frames:]
        if released:
            self._cache_frames -= len(released)
            self._pool.release(released)
        return []

    def counts(self) -> FrameCounts:
        """Walks over nothing."""
        return FrameCounts(
            free=self._pool.free,
            parameters=len(self._held),
            cache=self._cache_frames,
            arriving=self._arriving,
            shared=self._shared,
        )

    def check(self) -> None:
        """Raises AssertionError unless every frame has exactly one owner and every reference is counted."""
        owned = [held.frame for held in self._held.values()]
        references: dict[int, int] = {}
        for image_id, image in list(self._images.items()):
            owned.extend(image.cache)
            pages = set(image.resident)
            if image.plan:
                assert not pages & set(image.plan.pages), f"{image_id}: pages both resident and in flight"
                pages.update(image.plan.pages)
            for page in pages:
                references[image.contents[page]] = references.get(image.contents[page], 0) + 1
            for page in image.resident:
                assert self._held[image.contents[page]].arriving is None, f"{image_id}: page {page} is not there yet"
        assert len(owned) == len(set(owned)), "a frame has two owners"
        assert all(0 <= frame < self._frames for frame in owned), "a frame outside the pool is owned"
        assert len(owned) + self._pool.free == self._frames, "frames leaked"
        assert references == {content: held.references for content, held in self._held.items()}, "references differ"
        cache_frames = sum(len(image.cache) for image in list(self._images.values()))
        arriving = sum(held.arriving is not None for held in self._held.values())
        shared = sum(held.references > 1 for held in self._held.values())
        assert (self._cache_frames, self._arriving, self._shared) == (cache_frames, arriving, shared), "counters differ"

    def _image(self, image_id: str) -> _Image:
        try:
            return self._images[image_id]
        except KeyError:
            raise OrderRefused(f"{image_id} is not registered") from None

    def _swapping(self, image_id: str) -> tuple[_Image, SwapPlan]:
        image = self._image(image_id)
        if image.plan is None:
            raise OrderRefused(f"no swap of {image_id} is under way")
        return image, image.plan

    @staticmethod
    def _require_pages(image_id: str, image: _Image, pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages) or any(not 0 <= page < len(image.contents) for page in pages):
            raise OrderRefused(f"{image_id} has {len(image.contents)} pages; cannot take {tuple(pages)}")

    def _drop(self, contents: Sequence[int]) -> None:
        released = []
        for content in contents:
            held = self._held[content]
            held.references -= 1
            self._shared -= held.references == 1
            if held.references == 0:
                self._arriving -= held.arriving is not None
                released.append(held.frame)
                del self._held[content]
        if released:
            self._pool.release(released)
