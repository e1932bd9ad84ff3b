"""How a supervisor makes the process of a node: with a command, or from a warm process that has its libraries."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from computron.group.heartbeat import VARIABLE

log = logging.getLogger(__name__)

ANSWER_TIMEOUT = 10.0  # seconds; a warm start takes hundredths of one

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Starter(Protocol):
    """Makes processes that are children of this one, lead sessions of their own, and are killed when this one ends."""

    def start(self, environment: Mapping[str, str], heartbeat: int) -> int:
        """The pid of a new one, which has these variables beside this process's own and inherits the file descriptor
        `heartbeat`. Raises OSError.
        """


class Command:
    """Starts a node with a command."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def start(self, environment: Mapping[str, str], heartbeat: int) -> int:
        process = subprocess.Popen(
            self.command,
            env={**os.environ, **environment, VARIABLE: str(heartbeat)},
            stdin=subprocess.DEVNULL,
            pass_fds=(heartbeat,),
            start_new_session=True,  # a terminal's signals come to this process only
            preexec_fn=_death_with_parent(),
        )
        process.returncode = 0  # whoever supervises it waits for it
        return process.pid


class Warm:
    """Starts a node by forking a process that has loaded `modules`; while there is none, with `command`.

    Saves what each start would take to load them, and the memory of all copies but one. `environment`: what the
    libraries must find when they are loaded.
    """

    def __init__(self, command: Command, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = command
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            arguments = json.dumps({"modules": list(modules), "arguments": command.command})
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "computron.group.warm", str(fd), str(os.getpid()), arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                pass_fds=(fd,),
                start_new_session=True,
                preexec_fn=_death_with_parent(),
            )
        process.returncode = 0
        self._usable = False

    def wait(self) -> None:
        """Until it has loaded its modules, or has been found not to be usable."""
        reason = self._receive()
        self._usable = reason == "ready"
        if not self._usable:
            self._give_up(reason)

    def start(self, environment: Mapping[str, str], heartbeat: int) -> int:
        if self._usable:
            try:
                self._socket.settimeout(ANSWER_TIMEOUT)
                socket.send_fds(self._socket, [json.dumps(dict(environment)).encode()], [heartbeat])
                if answer := self._receive():
                    return int(answer)
                self._give_up("")
            except OSError as error:
                self._give_up(str(error))
        return self._command.start(environment, heartbeat)

    def _receive(self) -> str:
        return self._socket.recv(1 << 16).decode()

    def _give_up(self, reason: str) -> None:
        self.close()
        log.warning("warm_start_lost reason=%s", reason or "it has ended")

    def close(self) -> None:
        """End the warm process; the nodes that it has started go on. Idempotent."""
        self._usable = False
        self._socket.close()


def die_with(parent: int) -> None:
    """Be killed when `parent`, which must be the parent, ends, however it does."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _death_with_parent() -> Callable[[], None]:
    """For a new process, before it becomes another program."""
    parent = os.getpid()
    return lambda: die_with(parent)
