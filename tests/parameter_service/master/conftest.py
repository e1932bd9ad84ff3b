"""A master with settings under which tests do not wait long."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from computron.parameter_service.master.server import MasterServer, MasterSettings
from computron.parameter_service.master.state import Limits
from tests.parameter_service.master.fakes import KEY

QUICK = Limits(hold=0.3, join=0.01, loss=0.01, absence=0.5, unreachable=0.2)


@pytest.fixture
def settings(tmp_path: Path) -> MasterSettings:
    return MasterSettings(log=tmp_path / "log", port=0, limits=QUICK, key=KEY)


@pytest.fixture
async def server(settings: MasterSettings) -> AsyncIterator[MasterServer]:
    async with MasterServer(settings) as server:
        yield server
