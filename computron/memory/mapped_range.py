"""An address range whose mappings are changed by orders that may fail half-way."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Protocol

log = logging.getLogger(__name__)


class Addresses(Protocol):
    """What is needed of `_transfer.AddressRange`."""

    def map(self, slots: Sequence[int], frames: Sequence[int]) -> None: ...
    def unmap(self, slots: Sequence[int]) -> None: ...
    def mapped(self) -> list[int]: ...
    def close(self) -> None: ...


class MappedRange:
    """Slots that could not be unmapped are stale: nobody reads them, and they are unmapped before they are mapped
    again. `owner` names the range in the log. Used by one thread at a time."""

    def __init__(self, owner: str, addresses: Addresses) -> None:
        self._owner = owner
        self._addresses = addresses
        self._stale: set[int] = set()

    def map(self, slots: Sequence[int], frames: Sequence[int]) -> None:
        """Map frames[i] at slots[i]. Raises what the backend raises; none of the slots counts as mapped then."""
        try:
            if stale := sorted(self._stale.intersection(slots)):
                self._addresses.unmap(stale)
                self._stale.difference_update(stale)
            self._addresses.map(slots, frames)
        except Exception:
            self._remember(slots)
            raise

    def unmap(self, slots: Sequence[int]) -> None:
        """Raises nothing: what cannot be unmapped is stale."""
        try:
            self._addresses.unmap(slots)
        except Exception as error:
            self._remember(slots)
            log.warning(
                "unmap_failed range=%s slots=%d stale=%d error=%s", self._owner, len(slots), len(self._stale), error
            )

    def mapped(self) -> dict[int, int]:
        """Frame at each slot that is mapped and not stale."""
        frames = enumerate(self._addresses.mapped())
        return {slot: frame for slot, frame in frames if frame >= 0 and slot not in self._stale}

    def close(self) -> None:
        """Give the addresses back. Raises nothing: at worst they are lost until the process ends."""
        try:
            self._addresses.close()
        except Exception as error:
            log.warning("range_close_failed range=%s error=%s", self._owner, error)

    def _remember(self, slots: Collection[int]) -> None:
        frames = self._addresses.mapped()
        self._stale.difference_update(slots)
        self._stale.update(slot for slot in slots if frames[slot] >= 0)
