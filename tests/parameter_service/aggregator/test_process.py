"""An aggregator's process: how it begins and ends."""

from __future__ import annotations

import socket
import threading

import pytest

from computron.parameter_service.aggregator.process import Aggregator, AggregatorSettings
from tests.parameter_service.aggregator.cluster import KEY, MIB


async def test_who_cannot_listen_leaves_no_thread_that_keeps_the_process() -> None:
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = AggregatorSettings("http://127.0.0.1:1", "127.0.0.1", taken.getsockname()[1], MIB, KEY)
        with pytest.raises(OSError, match="in use"):
            await Aggregator(settings).run()
    assert not [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
