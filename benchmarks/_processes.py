"""Servers in processes of their own: a port for them, when they are ready, one request."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, seconds: float, require_alive: Callable[[], None]) -> None:
    """Until the address answers 200. `require_alive`: raises RuntimeError if nobody will ever answer.

    Raises RuntimeError after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        require_alive()
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"{url} was not ready after {seconds} s")


def post(url: str, body: Mapping[str, Any], timeout: float = 600) -> Any:
    """The JSON of the answer. Raises RuntimeError, with what was answered, for an error."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
