"""What is where on the device. Carries out swap-ins, evictions and cache sizes; the ledger of whoever orders them is
the authority, and an order that contradicts this one is refused with OrderRefused."""

from __future__ import annotations

import functools
import select
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from computron import _transfer
from computron.errors import CheckpointError, OutOfMemory, SwapFailed
from computron.memory.device_statistics import DeviceStatistics, SwapTotals
from computron.memory.gate import OPEN, Gate
from computron.memory.host_store import HostStore
from computron.memory.images import StoredImage
from computron.memory.mapped_range import MappedRange
from computron.memory.mapper import Bell, Mapper
from computron.memory.residency import OrderRefused, Residency
from computron.memory.swap import Swap, SwapOutcome, SwapState

__all__ = ["DeviceStatistics", "Gate", "OrderRefused", "Registered", "Swap", "SwapOutcome", "Swapper"]


@dataclass(frozen=True, slots=True)
class Registered:
    """The address ranges of an image. Frames come and go behind them; the addresses stay."""

    image: StoredImage
    parameters: _transfer.AddressRange
    cache: _transfer.AddressRange | None


class Swapper:
    """Used from one thread, but for `register` and the gates. Nothing here waits, `close` excepted.

    Raises OutOfMemory if `device_memory` (bytes) holds no frame of `page_bytes`.
    """

    def __init__(
        self,
        backend: _transfer.Backend,
        store: HostStore,
        *,
        device_memory: int,
        page_bytes: int,
        chunk_bytes: int,
        verify: bool,
    ) -> None:
        if device_memory < page_bytes:
            raise OutOfMemory(f"device.memory is {device_memory} bytes, less than one page of {page_bytes}")
        if page_bytes != store.page_bytes:
            raise ValueError(f"pages of {page_bytes} bytes on the device, of {store.page_bytes} in the host store")
        self.frames = device_memory // page_bytes
        self.frame_bytes = page_bytes
        self._store = store
        self._verify = verify
        self._pool = _transfer.DevicePool(backend, page_bytes, self.frames)
        self._engine = _transfer.TransferEngine(backend, self._pool, chunk_bytes=chunk_bytes)
        self._residency = Residency(self._pool)
        self._registered: dict[str, Registered] = {}
        self._parameters: dict[str, MappedRange] = {}  # changed on the mapper's thread only
        self._caches: dict[str, MappedRange] = {}
        self._swaps: dict[str, Swap] = {}
        self._by_transfer: dict[int, Swap] = {}
        self._stepping: Counter[str] = Counter()  # images that steps may be reading, and how many
        self._totals = SwapTotals()
        self._bell = Bell()
        self._mapper = Mapper(self._bell)
        self._epoll = select.epoll()
        self._epoll.register(self._engine.completions_fd, select.EPOLLIN)
        self._epoll.register(self._bell.descriptor, select.EPOLLIN)
        self._closed = False

    @property
    def free_frames(self) -> int:
        return self._pool.free

    @property
    def completions_fd(self) -> int:
        """Readable when `completions` has something to say."""
        return self._epoll.fileno()

    def register(self, image: StoredImage, *, cache_bytes: int = 0) -> Registered:
        """Reserve addresses for an image and, with `cache_bytes`, for a cache. Any thread."""
        parameters = _transfer.AddressRange(self._pool, max(image.nbytes, 1))
        cache = _transfer.AddressRange(self._pool, cache_bytes) if cache_bytes else None
        self._residency.add_image(image.id, image.pages)
        registered = Registered(image, parameters, cache)
        self._parameters[image.id] = MappedRange(f"{image.id}.parameters", parameters)
        if cache is not None:
            self._caches[image.id] = MappedRange(f"{image.id}.cache", cache)
        self._registered[image.id] = registered
        return registered

    def identify(self, image_id: str, identities: Sequence[int]) -> None:
        """From now on, pages of equal identities, here or in other images, are one page of the device, and no others.

        `identities`: one for each page; their contents must be equal where they are. Without this call it is the
        contents that identify pages. Several devices that hold shards of the same models agree by this on what is
        shared. Raises OrderRefused while any page of the image is on the device.
        """
        self._residency.identify(image_id, identities)

    def unregister(self, image_id: str) -> None:
        """Give the addresses back once no view of them is left. Everything of the image must have left the device."""
        self._refuse_while_stepping(image_id, "be unregistered")
        self._residency.remove_image(image_id)
        del self._registered[image_id]
        self._mapper.submit(self._parameters.pop(image_id).close)
        if cache := self._caches.pop(image_id, None):
            self._mapper.submit(cache.close)

    def swap_in(self, image_id: str, pages: Sequence[int], urgency: int) -> Swap:
        """Start to bring pages to the device, in this order; contents that are there for other images are only mapped.

        The end comes out of `completions`, also that of a swap that cannot even start because a checkpoint changed.
        Raises DeviceFailed if the device is lost.
        """
        plan = self._residency.begin(image_id, pages)
        swap = Swap(self._registered[image_id].image, plan, self._verify)
        try:
            self._start(swap, image_id, urgency)
        except BaseException:
            self._residency.abandon(image_id)
            if swap.lease is not None:
                self._store.release(swap.lease, ())
            raise
        self._swaps[image_id] = swap
        self._by_transfer[swap.transfer.id] = swap
        return swap

    def _start(self, swap: Swap, image_id: str, urgency: int) -> None:
        try:
            swap.lease = self._store.lease(image_id, swap.moved_contents)
        except CheckpointError as error:
            swap.fail(str(error))
            swap.mapping_ended = True
            # A transfer of nothing ends at once, so that this swap ends in the same way as all others.
            swap.transfer = self._engine.submit((), (), (), (), priority=urgency)
            return
        # The copy goes through addresses of its own: the link is at work while the pages are mapped.
        swap.transfer = self._engine.submit(
            [swap.plan.frames[position] for position in swap.plan.moved],
            swap.lease.sources,
            swap.moved_sizes,
            [group.moved for group in swap.groups],
            priority=urgency,
        )
        self._mapper.submit(functools.partial(self._map, swap))

    def _map(self, swap: Swap) -> None:
        swap.map_all(self._parameters[swap.image_id])
        self._bell.ring()

    def raise_urgency(self, image_id: str, urgency: int) -> None:
        """Let the image's swap be of this urgency from its next chunk on, if it is still under way."""
        if swap := self._swaps.get(image_id):
            swap.transfer.raise_priority(urgency)

    def cancel(self, image_id: str) -> None:
        """Stop the image's swap, if it is still under way: its gates raise at once, verifying or not. `completions`
        tells what had arrived, and stays."""
        if swap := self._swaps.get(image_id):
            swap.cancel()

    def cancel_all(self) -> None:
        """Stop all swaps. No gate waits any longer then, whether `completions` is ever called again or not."""
        for image_id in self._swaps:
            self.cancel(image_id)

    def evict(self, image_id: str, pages: Sequence[int]) -> None:
        """Unmap pages. The frames of those that no other image has are free at once.

        Raises OrderRefused while a step of the image runs.
        """
        self._refuse_while_stepping(image_id, "lose pages")
        self._residency.evict(image_id, pages)
        self._unmap(image_id, pages)

    def _unmap(self, image_id: str, slots: Sequence[int]) -> None:
        if slots:
            self._mapper.submit(functools.partial(self._parameters[image_id].unmap, tuple(slots)))

    def set_cache(self, image_id: str, frames: int) -> None:
        """Let the cache range have frames at its slots 0 to `frames`, and no others. Mapped on return.

        Raises SwapFailed, with the cache as it was, if mapping fails, and OrderRefused if the cache would shrink while
        a step of the image runs.
        """
        before = self._residency.cache_frames(image_id)
        if frames < before:
            self._refuse_while_stepping(image_id, "lose cache")
        if frames > self.cache_limit(image_id):
            raise OrderRefused(f"{image_id} has no room for a cache of {frames} frames")
        added = self._residency.set_cache(image_id, frames)
        if frames < before:
            self._caches[image_id].unmap(range(frames, before))
        if not added:
            return
        try:
            self._caches[image_id].map(range(before, frames), added)
        except Exception as error:
            self._residency.set_cache(image_id, before)
            raise SwapFailed(f"mapping the cache of {image_id} failed: {error}") from error

    def gate(self, image_id: str) -> Gate:
        """What a reader of the image has to wait at: its swap under way, or nothing. Promises nothing about how long
        what has passed the gate stays; a step asks `begin_step`."""
        return self._swaps.get(image_id, OPEN)

    def begin_step(self, image_id: str) -> Gate:
        """The gate for a step, which may read what has passed the gate until `end_step`.

        If the image's swap fails or is cancelled meanwhile, the gate raises at once, but its pages stay mapped and
        its frames taken until the step, and every other of the image, has ended; only then does `completions` tell of
        it.
        """
        self._stepping[image_id] += 1
        return self.gate(image_id)

    def end_step(self, image_id: str) -> None:
        """A step reads nothing any more. What waited for the end of the last one comes out of `completions` now."""
        assert self._stepping[image_id] > 0, f"no step of {image_id} has begun"
        self._stepping[image_id] -= 1
        if self._stepping[image_id]:
            return
        del self._stepping[image_id]
        if image_id in self._swaps:
            self._bell.ring()

    def _refuse_while_stepping(self, image_id: str, order: str) -> None:
        if image_id in self._stepping:
            raise OrderRefused(f"{image_id} cannot {order} while a step of it runs")

    def resident_pages(self, image_id: str) -> frozenset[int]:
        return self._residency.resident(image_id)

    def missing_pages(self, image_id: str) -> int:
        """How many pages are neither on the device nor on their way."""
        return self._residency.missing(image_id)

    @property
    def swapping(self) -> bool:
        """Whether a swap has not come out of `completions` yet."""
        return bool(self._swaps)

    def cache_limit(self, image_id: str) -> int:
        """Frames that the image's cache range has room for."""
        room = self._registered[image_id].cache
        return 0 if room is None else room.nbytes // self.frame_bytes

    def cache_frames(self, image_id: str) -> int:
        return self._residency.cache_frames(image_id)

    def completions(self) -> list[SwapOutcome]:
        """Swaps that ended since the last call.

        Raises what a job of the mapper raised, which is a mistake in this program: what the backend refuses to map
        fails a swap, and what it refuses to unmap is logged and tried again before the next mapping.
        """
        self._mapper.raise_failure()
        self._bell.answer()
        for transfer in self._engine.completions():
            self._by_transfer.pop(transfer.id).transfer_ended = True
        ended = [swap for swap in self._swaps.values() if self._has_ended(swap)]
        return [self._settle(swap) for swap in ended if not self._is_being_read(swap)]

    def _is_being_read(self, swap: Swap) -> bool:
        """Whether a step may be reading pages that the end of this swap would take away."""
        if swap.image_id not in self._stepping:
            return False
        if error := self._error_of(swap):
            swap.fail(error)
        return swap.trouble is not None

    def _has_ended(self, swap: Swap) -> bool:
        """Whether nothing of the swap is under way; its verification begins when all else has ended."""
        if not (swap.transfer_ended and swap.mapping_ended):
            return False
        if swap.verification == "wanted":
            swap.verification = "running"
            self._mapper.submit(functools.partial(self._check_digests, swap))
        return swap.verification in ("none", "ended")

    def _check_digests(self, swap: Swap) -> None:
        swap.verify(self._pool, self._store.digest)
        self._bell.ring()

    def _settle(self, swap: Swap) -> SwapOutcome:
        image_id = swap.image_id
        error = self._error_of(swap)
        arrived = swap.arrived() if error is None else []
        if error is None:
            plan = swap.plan
            dropped = self._residency.settle(image_id, {plan.contents[plan.moved[index]] for index in arrived})
        else:
            dropped = self._residency.abandon(image_id)
        if swap.lease is not None:
            self._store.release(swap.lease, {swap.moved_contents[index] for index in arrived})
        gone = set(dropped)
        self._unmap(image_id, [slot for slot in swap.mapped_slots() if slot in gone])
        del self._swaps[image_id]
        state: SwapState = "done"
        if error is not None:
            state = "failed"
        elif swap.cancelled:
            state = "cancelled"
        swap.end(error)
        outcome = swap.outcome(state, tuple(page for page in swap.pages if page not in gone))
        sizes = self._registered[image_id].image.page_sizes
        self._totals.add(outcome, sum(sizes[page] for page in swap.pages))
        return outcome

    def _error_of(self, swap: Swap) -> str | None:
        if swap.error is not None:
            return swap.error
        if swap.transfer.state == "failed":
            return swap.transfer.error or "the transfer failed"
        if swap.lease is not None:
            try:
                self._store.require_unchanged(swap.lease)
            except CheckpointError as error:
                return str(error)
        return None

    def statistics(self) -> DeviceStatistics:
        return self._totals.statistics(self.frames, self._residency.counts(), self._engine.statistics()["seconds_busy"])

    def check(self) -> None:
        """Raises AssertionError if a frame has two owners or none, or a range maps what it should not.

        Waits for mapping under way: for tests and for moments when nobody is in a hurry.
        """
        self._mapper.drain()
        self._residency.check()
        for image_id in list(self._registered):
            if image_id not in self._swaps:
                expected = self._residency.mapping(image_id)
                mapped = self._parameters[image_id].mapped()
                assert mapped == expected, f"{image_id} maps {mapped} instead of {expected}"
            if cache := self._caches.get(image_id):
                frames = dict(enumerate(self._residency.cache_mapping(image_id)))
                assert cache.mapped() == frames, f"the cache of {image_id} maps {cache.mapped()} instead of {frames}"

    def close(self) -> None:
        """Cancel all transfers, wait for chunks in flight, give the device's memory back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._engine.close()
        self._mapper.close()
        for swap in self._swaps.values():
            if swap.lease is not None:
                self._store.release(swap.lease, ())
            swap.end("the device is being closed")
        self._swaps.clear()
        for addresses in (*self._parameters.values(), *self._caches.values()):
            addresses.close()
        self._pool.close()
        self._epoll.close()
        self._bell.close()
