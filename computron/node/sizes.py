"""Whether each model can ever be on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from computron.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Need:
    """Pages of a model on a device. `generates`: it cannot run without a page of KV cache."""

    model: str
    pages: int
    generates: bool
    pinned: bool


def pinned_beside(model: str, needs: Sequence[Need]) -> int:
    """Pages of the pinned models other than this one."""
    return sum(need.pages for need in needs if need.pinned and need.model != model)


def check_sizes(needs: Sequence[Need], frames: int, page_bytes: int) -> None:
    """Raises ConfigError if a device of so many frames can never hold one of the models beside the pinned ones."""

    def mib(pages: int) -> str:
        return f"{pages * page_bytes / MIB:.1f} MiB"

    for need in needs:
        needed = need.pages + need.generates
        pinned = pinned_beside(need.model, needs)
        if needed + pinned > frames:
            beside = f" beside {mib(pinned)} of pinned models" if pinned else ""
            cache = " (its parameters and one page of KV cache)" if need.generates else ""
            raise ConfigError(
                f"model {need.model!r} needs {mib(needed)} of device memory{cache}{beside}, but device.memory is "
                f"{mib(frames)}: raise device.memory{', pin fewer models' if pinned else ''} or choose a smaller dtype",
                param="device.memory",
            )
