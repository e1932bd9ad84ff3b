"""What a run waits at before each of its stages."""

from __future__ import annotations

from typing import Final, Protocol


class Gate(Protocol):
    @property
    def is_open(self) -> bool:
        """True if everything is there, so that no wait would block."""

    def wait(self, segment: int, stream: int = 0) -> None:
        """Block, without the GIL, until all pages of segments 0 to `segment` are there. On CUDA the wait for the
        last bytes happens on `stream`, on the device.

        Raises SwapFailed if they will not come.
        """


class OpenGate:
    """Nothing is under way: what is there is there."""

    is_open = True

    def wait(self, segment: int, stream: int = 0) -> None:
        return


OPEN: Final = OpenGate()
