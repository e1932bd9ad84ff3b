"""One swap-in under way: its transfer, its mapping, and the gate that waits for both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from computron import _transfer
from computron.errors import SwapFailed
from computron.memory.images import StoredImage
from computron.memory.mapped_range import MappedRange
from computron.memory.pages import Lease
from computron.memory.residency import SwapPlan

SwapState = Literal["done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class SwapOutcome:
    """How a swap ended. `pages` are those ordered, `arrived` those of them now on the device.

    `seconds`: from the first chunk on the link to the last; `started`, `finished`: `time.monotonic()` of the order
    and of the end; `error`: words if it failed.
    """

    image_id: str
    pages: tuple[int, ...]
    state: SwapState
    arrived: tuple[int, ...]
    seconds: float
    bytes_moved: int
    error: str | None
    started: float
    finished: float


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive pages of a plan that belong to one segment. `slots[i]` is mapped to `frames[i]`."""

    segment: int
    slots: tuple[int, ...]
    frames: tuple[int, ...]
    moved: int  # how many of them travel


def group_by_segment(image: StoredImage, plan: SwapPlan) -> tuple[Group, ...]:
    owner = [segment for segment, count in enumerate(image.segments) for _ in range(count)]
    moved = set(plan.moved)
    groups = []
    start = 0
    for end in range(1, len(plan.pages) + 1):
        segment = owner[plan.pages[start]]
        if end == len(plan.pages) or owner[plan.pages[end]] != segment:
            travelling = sum(position in moved for position in range(start, end))
            groups.append(Group(segment, plan.pages[start:end], plan.frames[start:end], travelling))
            start = end
    return tuple(groups)


class Swap:
    """Made and ended by the Swapper on its thread; `map_all` and `verify` run on the mapper's; `wait` on any."""

    is_open = False  # as long as it is under way it is asked, segment by segment

    def __init__(self, image: StoredImage, plan: SwapPlan, verify: bool) -> None:
        self.image_id = image.id
        self.plan = plan
        self.started = time.monotonic()
        self.groups = group_by_segment(image, plan)
        self.moved_contents = tuple(image.pages[plan.pages[position]] for position in plan.moved)
        self.moved_sizes = tuple(image.page_sizes[plan.pages[position]] for position in plan.moved)
        self.lease: Lease | None = None
        self.error: str | None = None  # why it will fail, once that is known; the first reason counts
        self.cancelled = False
        self.mapped_groups = 0
        self.mapping_ended = False
        self.transfer_ended = False
        self.verification: Literal["none", "wanted", "running", "ended"] = "wanted" if verify else "none"
        self.transfer: _transfer.Transfer
        self._needs = _groups_needed(self.groups, len(image.segments))
        self._ended = False
        self._changed = threading.Condition()

    @property
    def pages(self) -> tuple[int, ...]:
        return self.plan.pages

    @property
    def total_bytes(self) -> int:
        return self.transfer.total_bytes

    @property
    def bytes_done(self) -> int:
        return self.transfer.bytes_done

    def fail(self, words: str) -> None:
        with self._changed:
            self.error = self.error or words
            self._changed.notify_all()

    def cancel(self) -> None:
        """Let no gate wait for it any longer, and no further chunk start."""
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()
        self.transfer.cancel()

    @property
    def trouble(self) -> str | None:
        """Why it will not complete, once that is known."""
        return self.error or ("it was cancelled" if self.cancelled else None)

    def end(self, error: str | None) -> None:
        with self._changed:
            self.error = error
            self._ended = True
            self._changed.notify_all()

    def outcome(self, state: SwapState, arrived: tuple[int, ...]) -> SwapOutcome:
        """Of a swap that has ended now."""
        return SwapOutcome(
            image_id=self.image_id,
            pages=self.pages,
            state=state,
            arrived=arrived,
            seconds=self.transfer.seconds,
            bytes_moved=self.transfer.bytes_done,
            error=self.error if state == "failed" else None,
            started=self.started,
            finished=time.monotonic(),
        )

    def map_all(self, parameters: MappedRange) -> None:
        """Map the pages group by group. An error fails the swap and stops its transfer."""
        try:
            for group in self.groups:
                try:
                    parameters.map(group.slots, group.frames)
                except Exception as error:
                    self.fail(f"mapping pages {group.slots[0]} to {group.slots[-1]} failed: {error}")
                    self.transfer.cancel()
                    break
                with self._changed:
                    self.mapped_groups += 1
                    self._changed.notify_all()
        finally:
            self.mapping_ended = True

    def mapped_slots(self) -> list[int]:
        return [slot for group in self.groups[: self.mapped_groups] for slot in group.slots]

    def arrived(self) -> list[int]:
        """Positions in the plan's `moved` of the contents that are whole on the device."""
        return [index for index in range(len(self.plan.moved)) if self.transfer.page_done(index)]

    def verify(self, pool: _transfer.DevicePool, digest_of: Callable[[int], bytes]) -> None:
        """Compare what arrived with the digests of its contents; a difference fails the swap."""
        try:
            for index, position in enumerate(self.plan.moved):
                if not self.transfer.page_done(index):
                    continue
                page = self.plan.pages[position]
                try:
                    digest = pool.digest(self.plan.frames[position], self.moved_sizes[index])
                    if digest != digest_of(self.moved_contents[index]):
                        self.fail(f"page {page} has a wrong digest on the device")
                except Exception as error:
                    self.fail(f"the digest of page {page} cannot be had: {error}")
        finally:
            self.verification = "ended"

    def wait(self, segment: int, stream: int = 0) -> None:
        """See Gate.wait. With verification a gate opens at the end: unverified bytes are not computed with."""
        needed = self._needs[segment]
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self.trouble is not None or self._is_mapped(needed))
            if self.trouble is not None:
                raise self._failure(self.trouble)
            if self._ended:
                return
        try:
            for group in range(needed):
                self.transfer.wait_segment(group, stream)
        except _transfer.TransferError as error:
            raise self._failure(self.trouble or str(error)) from error

    def _is_mapped(self, groups: int) -> bool:
        return self.verification == "none" and self.mapped_groups >= groups

    def _failure(self, words: str) -> SwapFailed:
        return SwapFailed(f"{self.image_id} could not be brought to the device: {words}")


def _groups_needed(groups: Sequence[Group], segments: int) -> list[int]:
    """For each segment, how many of the first groups hold all pages of it and of the segments before it."""
    needs = []
    for segment in range(segments):
        last = max((index for index, group in enumerate(groups) if group.segment <= segment), default=-1)
        needs.append(last + 1)
    return needs
