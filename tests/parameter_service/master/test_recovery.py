"""What a master makes of the files that it finds when it starts."""

from __future__ import annotations

from pathlib import Path

from computron.parameter_service.master.server import MasterServer, MasterSettings
from computron.parameter_service.versions.names import snapshot_path
from tests.parameter_service.master.fakes import KEY, FakeAgent, FakeAggregator, job_spec


async def test_a_new_log_does_not_bring_back_what_a_job_of_the_name_left(tmp_path: Path) -> None:
    settings = MasterSettings(log=tmp_path / "log", port=0, key=KEY, snapshots=tmp_path / "files")
    old = snapshot_path(tmp_path / "files", "lm", 1000, 3)
    old.parent.mkdir(parents=True)
    old.touch()
    async with MasterServer(settings) as first, FakeAggregator(first.url, "one"), FakeAgent(first.url) as agent:
        await agent.enlist(job_spec(snapshot_every=10))
        assert (await agent.placed()).epoch == 4
    async with MasterServer(settings) as second:
        assert second.master.state.jobs["lm"].book.snapshots == []
