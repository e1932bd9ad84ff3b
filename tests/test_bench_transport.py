"""The benchmark of transports fails where its server dies, and does not wait for it."""

from __future__ import annotations

import importlib
import operator
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from computron.parameter_service.wire.link import Link, listen

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("_transport")


def test_a_server_that_dies_before_it_listens_is_an_error(transport: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="ended before it listened"):
        transport._with(operator.eq, 0, lambda port: [])


class Closing:
    """Ends each link with the first message."""

    def destination(self, link: Link, message: Any, size: int) -> None: ...

    def received(self, link: Link, message: Any, fds: list[int]) -> None:
        link.close()

    def lost(self, link: Link, reason: str) -> None: ...


async def test_a_server_that_dies_before_it_answers_is_an_error(transport: ModuleType) -> None:
    listener = await listen("127.0.0.1", 0, f"\0computron-test-{uuid.uuid4().hex}", Closing())
    with pytest.raises(RuntimeError, match="the server's link ended"):
        await transport._through_links(listener.port, 2048, 1)
    listener.close()
