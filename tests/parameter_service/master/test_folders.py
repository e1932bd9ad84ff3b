"""Aggregators of several machines that were given folders of the same name, but not the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from computron.parameter_service.master.server import MasterServer, MasterSettings
from computron.parameter_service.versions.files import SharedFile
from computron.parameter_service.wire.messages import Kept, Saved, Unpublished
from tests.parameter_service.master.fakes import KEY, FakeAgent, FakeAggregator, job_spec


@pytest.mark.parametrize("version", ["", "v1"])
async def test_a_file_of_which_some_is_in_another_folder_does_not_count(version: str, tmp_path: Path) -> None:
    path, history = tmp_path / "lm" / "file", 1 if version else 0
    with SharedFile(path, [("w", "float32", (4,))], {}, history) as file:
        file.mark([0, 1])
    settings = MasterSettings(log=tmp_path / "log", port=0, key=KEY)
    async with (
        MasterServer(settings) as server,
        FakeAggregator(server.url, "one") as aggregator,
        FakeAgent(server.url) as agent,
    ):
        await agent.enlist(job_spec(blocks=4, snapshot_every=10))
        await agent.placed()
        await aggregator.say(Saved("lm", version, 10, str(path), (0, 1, 2, 3), (), history))
        if version:
            assert "not all of it was written to this folder" in (await agent.heard(Unpublished)).message
        else:
            await aggregator.heard(Kept, step=None)
        assert not path.exists()
