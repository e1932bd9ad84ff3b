"""A node's sign of life: one byte a second or more from its event loop, to whoever started it."""

from __future__ import annotations

import asyncio
import os

VARIABLE = "COMPUTRON_HEARTBEAT_FD"  # holds the pipe's file descriptor, which the process inherits
EVERY = "COMPUTRON_HEARTBEAT_SECONDS"  # how long the listener wants to wait for one, if less than INTERVAL
INTERVAL = 1.0  # seconds


class Heartbeat:
    """Beats from its making until `close`. Silence from a pipe that is open means: this process hangs."""

    def __init__(self, fd: int, interval: float | None = None) -> None:
        """`interval`: in seconds, instead of INTERVAL."""
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        self._fd: int | None = fd
        self._interval = INTERVAL if interval is None else interval
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._beat()

    @classmethod
    def from_environment(cls) -> Heartbeat | None:
        """None where nobody listens. To be called once, in the event loop."""
        fd = os.environ.pop(VARIABLE, None)  # not for this process's own children
        if fd is None:
            return None
        return cls(int(fd), min(INTERVAL, float(os.environ.get(EVERY, INTERVAL))))

    def _beat(self) -> None:
        assert self._fd is not None
        try:
            os.write(self._fd, b".")
        except BlockingIOError:  # unread beats fill the pipe: the listener is stopped, and may go on later
            pass
        except OSError:  # it is gone
            self.close()
            return
        self._timer = self._loop.call_later(self._interval, self._beat)

    def close(self) -> None:
        """Say that this process is about to end. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
