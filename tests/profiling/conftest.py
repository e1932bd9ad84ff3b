"""Servers to be measured."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from aiohttp import web

from tests.profiling.stand_in import StandIn

Serving = Callable[[StandIn], AbstractAsyncContextManager[str]]


@pytest.fixture
def serving() -> Serving:
    """Lets a stand-in listen; gives its address."""

    @asynccontextmanager
    async def serve(server: StandIn) -> AsyncIterator[str]:
        runner = web.AppRunner(server.app())
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            yield f"{host}:{port}"
        finally:
            await runner.cleanup()

    return serve
