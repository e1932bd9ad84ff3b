"""The master's process, over real websockets, with aggregators and agents that only speak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec
import pytest

from computron.parameter_service.master.events import Exited
from computron.parameter_service.master.server import MasterServer, MasterSettings
from computron.parameter_service.wire.messages import (
    Denied,
    Drop,
    Failed,
    HeldCommit,
    Host,
    Leave,
    Move,
    Registered,
    Saved,
    Unreachable,
    WorkerLost,
)
from tests.parameter_service.master.fakes import FakeAgent, FakeAggregator, address_of, job_spec


def saved(aggregator: FakeAggregator, step: int, folder: Path, blocks: tuple[int, ...]) -> Saved:
    path = folder / f"{step}.safetensors"
    path.touch()
    aggregator.applied["lm"].update(dict.fromkeys(blocks, step))
    return Saved("lm", "", step, str(path), blocks)


async def test_a_job_with_one_worker_gets_its_place(server: MasterServer) -> None:
    async with FakeAggregator(server.url, "one") as aggregator, FakeAgent(server.url) as agent:
        await agent.enlist(job_spec())
        placement = await agent.placed()
        assert (placement.epoch, placement.rank, placement.members) == (1, 0, (0,))
        assert [placement.addresses[place].aggregator for place in placement.owners] == ["one"] * 4
        assert placement.initialise
        host = await aggregator.heard(Host)
        assert (host.blocks, host.source, host.applied) == ((0, 1, 2, 3), "worker", 0)


async def test_a_job_waits_for_its_workers_and_for_an_aggregator(server: MasterServer) -> None:
    async with FakeAgent(server.url) as first, FakeAgent(server.url) as second:
        await first.enlist(job_spec(workers=2), None, incarnation="x")
        await second.enlist(job_spec(workers=2), None, incarnation="y")
        assert first.received == []
        async with FakeAggregator(server.url, "one"):
            placements = [await first.placed(), await second.placed()]
            assert [placement.rank for placement in placements] == [0, 1]
            assert [placement.initialise for placement in placements] == [True, False]


async def test_a_second_worker_joins_a_running_job(server: MasterServer) -> None:
    async with (
        FakeAggregator(server.url, "one") as aggregator,
        FakeAgent(server.url) as first,
        FakeAgent(server.url) as second,
    ):
        await first.enlist(job_spec())
        await first.placed()
        aggregator.applied["lm"] = dict.fromkeys(range(4), 7)
        await second.enlist(job_spec(), None, incarnation="b")
        placement = await first.placed(epoch=2)
        assert (placement.members, placement.applied, placement.initialise) == ((0, 1), 7, False)
        await second.placed(epoch=2, rank=1)
        assert (await aggregator.heard(Host, source="keep")).applied == 7
        await second.say(Leave("lm", 1, 9))
        assert (await first.placed(epoch=3)).members == (0,)


async def test_a_step_that_one_aggregator_lacks_is_completed_before_the_job_goes_on(server: MasterServer) -> None:
    async with (
        FakeAggregator(server.url, "one", memory=3 * 2 * 4096) as one,
        FakeAggregator(server.url, "two") as two,
        FakeAgent(server.url) as first,
        FakeAgent(server.url) as second,
    ):
        await first.enlist(job_spec(workers=2))
        await second.enlist(job_spec(workers=2), 1, incarnation="b")
        await first.placed()
        mine, theirs = sorted([one, two], key=lambda aggregator: len(aggregator.applied.get("lm", {})))
        if not mine.applied.get("lm"):
            block = min(theirs.applied["lm"])
            mine.applied["lm"] = {block: theirs.applied["lm"].pop(block)}
        mine.applied["lm"] = dict.fromkeys(mine.applied["lm"], 4)
        theirs.applied["lm"] = dict.fromkeys(theirs.applied["lm"], 5)
        theirs.commits["lm"] = tuple(HeldCommit(rank, 5, (), 1.0, False, None) for rank in (0, 1))
        await one.say(WorkerLost("lm", 1, "b"))
        await second.close()
        placement = await first.placed(epoch=2)
        assert (placement.applied, placement.lost, placement.members) == (5, 0, (0,))
        assert set(mine.applied["lm"].values()) == {5}


async def test_a_dead_aggregator_rolls_its_job_back_to_the_last_complete_snapshot(
    server: MasterServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("computron.parameter_service.master.server.finish", lambda path, history, count: None)
    async with FakeAggregator(server.url, "two") as two, FakeAgent(server.url) as agent:
        async with FakeAggregator(server.url, "one", memory=1 << 31) as one:
            await agent.enlist(job_spec(snapshot_every=10))
            await agent.placed()
            await one.say(saved(one, 10, tmp_path, (0, 1, 2, 3)))
            await one.say(saved(one, 20, tmp_path, (0, 1)))  # the other half never comes
            async with aiohttp.ClientSession() as session:
                while (await _json(session, f"{server.url}/v1/jobs/lm"))["step"] < 20:
                    pass
        server.tell(Exited("one"))
        placement = await agent.placed(epoch=2)
        assert (placement.applied, placement.lost, placement.initialise) == (10, 10, False)
        assert [placement.addresses[place].aggregator for place in placement.owners] == ["two"] * 4
        assert (await two.heard(Host)).source.endswith("10.safetensors")


async def test_a_job_without_a_snapshot_fails_and_says_what_to_do(server: MasterServer) -> None:
    async with FakeAgent(server.url) as agent, FakeAggregator(server.url, "two"):
        async with FakeAggregator(server.url, "one", memory=1 << 31) as one:
            await agent.enlist(job_spec(snapshot_every=100))
            await agent.placed()
            await one.say(Saved("lm", "", 50, "/nowhere", (0,)))
        server.tell(Exited("one"))
        assert "one is taken every 100 steps" in (await agent.heard(Denied)).message


async def test_a_job_of_which_nothing_is_saved_ends_with_its_aggregator(server: MasterServer) -> None:
    """What is left are blocks of different steps, and what the workers have is no better."""
    async with FakeAgent(server.url) as agent, FakeAggregator(server.url, "two"):
        async with FakeAggregator(server.url, "one", memory=1 << 31):
            await agent.enlist(job_spec())
            await agent.placed()
        server.tell(Exited("one"))
        assert "set snapshot_every" in (await agent.heard(Denied)).message


async def test_a_job_whose_snapshots_fail_does_not_begin_anew(server: MasterServer) -> None:
    """It may have taken steps that the master has not heard of yet."""
    async with FakeAgent(server.url) as agent, FakeAggregator(server.url, "two"):
        async with FakeAggregator(server.url, "one", memory=1 << 31) as one:
            await agent.enlist(job_spec(snapshot_every=10))
            await agent.placed()
            await one.say(Failed("lm", 1, "save", "the disk is full"))
            async with aiohttp.ClientSession() as web:
                while not (await _json(web, f"{server.url}/v1/jobs/lm"))["reason"]:
                    pass
        server.tell(Exited("one"))
        assert "no snapshot could be written: one: the disk is full" in (await agent.heard(Denied)).message


async def test_a_snapshot_that_cannot_be_finished_is_told(server: MasterServer, tmp_path: Path) -> None:
    async with FakeAggregator(server.url, "one") as one, FakeAgent(server.url) as agent, aiohttp.ClientSession() as web:
        await agent.enlist(job_spec(snapshot_every=10))
        await agent.placed()
        await one.say(Saved("lm", "", 10, str(tmp_path / "nowhere"), (0, 1, 2, 3)))
        while not (job := await _json(web, f"{server.url}/v1/jobs/lm"))["reason"]:
            pass
        assert "nowhere" in str(job["reason"])
        assert job["snapshot_step"] is None


async def test_a_link_that_breaks_is_not_a_death(server: MasterServer) -> None:
    async with FakeAgent(server.url) as agent:
        async with FakeAggregator(server.url, "one"):
            await agent.enlist(job_spec(snapshot_every=10))
            await agent.placed()
        assert server.master.state.jobs["lm"].book.epoch == 1
        await agent.say(Unreachable("lm", 0, 1, address_of("one"), "refused"))
        async with FakeAggregator(server.url, "two"):
            placement = await agent.placed(epoch=2)
            assert placement.addresses[0].aggregator == "two"
            async with FakeAggregator(server.url, "one") as late:
                assert (await late.heard(Registered)).drop == ()


async def test_the_next_master_goes_on_where_the_last_one_ended(settings: MasterSettings) -> None:
    async with MasterServer(settings) as first:
        port = int(first.url.rpartition(":")[2])
        async with FakeAggregator(first.url, "one") as one, FakeAgent(first.url) as agent:
            await agent.enlist(job_spec())
            await agent.placed()
            blocks = one.applied["lm"]
    async with MasterServer(replace(settings, port=port)) as second, FakeAgent(second.url) as agent:
        await agent.enlist(job_spec())
        again = await agent.placed(epoch=1)
        assert again.addresses[0].aggregator == "one"
        returning = FakeAggregator(second.url, "one")  # it registers with nothing: asked how things stand
        returning.applied["lm"] = dict(blocks)
        async with returning:
            placement = await agent.placed(epoch=2)
            assert (placement.applied, placement.reason) == (0, "the master was away")


async def test_a_job_that_the_master_has_forgotten_is_taken_up_again(server: MasterServer) -> None:
    spec = job_spec()
    async with (
        FakeAggregator(server.url, "one", hosts=(spec, 6, {0: 5, 1: 5})),
        FakeAgent(server.url) as agent,
        FakeAggregator(server.url, "two", hosts=(spec, 6, {2: 5, 3: 5})),
    ):
        await agent.enlist(spec, incarnation="of old")
        placement = await agent.placed()
        assert (placement.epoch, placement.applied, placement.lost) == (7, 5, 0)
        names = [placement.addresses[place].aggregator for place in placement.owners]
        assert names == ["one", "one", "two", "two"]


async def test_a_deleted_job_is_not_taken_up_again(settings: MasterSettings) -> None:
    """An aggregator that was away when it was deleted comes back with it, maybe to the next master."""
    spec = job_spec(blocks=2)
    async with MasterServer(settings) as first:
        async with FakeAggregator(first.url, "one"), FakeAgent(first.url) as agent, aiohttp.ClientSession() as web:
            await agent.enlist(spec)
            await agent.placed()
            async with web.delete(f"{first.url}/v1/jobs/lm") as answer:
                assert answer.status < 300
        async with FakeAggregator(first.url, "one", hosts=(spec, 1, {0: 5, 1: 5})) as one:
            assert (await one.heard(Registered)).drop == ("lm",)
    async with MasterServer(settings) as second:
        async with FakeAggregator(second.url, "one", hosts=(spec, 1, {0: 5, 1: 5})) as one:
            assert (await one.heard(Registered)).drop == ("lm",)
        async with FakeAggregator(second.url, "one"), FakeAgent(second.url) as agent:
            await agent.enlist(spec)  # a new one of the same name
            await agent.placed()


async def test_blocks_are_moved_as_asked(server: MasterServer) -> None:
    async with (
        FakeAggregator(server.url, "one", memory=1 << 31) as one,
        FakeAgent(server.url) as agent,
        FakeAggregator(server.url, "two"),
        aiohttp.ClientSession() as session,
    ):
        await agent.enlist(job_spec())
        await agent.placed()
        job = f"{server.url}/v1/jobs/lm"
        async with session.post(f"{job}/move", json={"blocks": [1, 3], "to": "two"}) as answer:
            assert answer.status == 202
        move = await one.heard(Move)
        assert (move.blocks, move.to.aggregator) == ((1, 3), "two")
        while (await _json(session, job))["moving"]:
            pass
        assert (await _json(session, job))["aggregators"] == {"one": 2, "two": 2}
        assert (await _json(session, job))["migrations"] == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"token": "wrong"}, "bad_token"),
        ({"spec": job_spec(blocks=5)}, "different_job"),
        ({"spec": job_spec(snapshot_every=3)}, "different_job"),
        ({"spec": job_spec("new", workers=0)}, "bad_message"),
        ({"spec": job_spec("a/b c")}, "bad_message"),
        ({"spec": job_spec("large", blocks=400)}, "quota"),
    ],
)
async def test_who_does_not_fit_is_denied(settings: MasterSettings, change: dict[str, object], code: str) -> None:
    limited = replace(settings, limits=replace(settings.limits, max_job_memory=1 << 20))
    async with (
        MasterServer(limited) as server,
        FakeAgent(server.url) as first,
        FakeAgent(server.url) as second,
        FakeAggregator(server.url, "one"),
    ):
        await first.enlist(job_spec())
        await first.placed()
        await second.enlist(**{"spec": job_spec(), "rank": 1, **change})
        assert (await second.heard(Denied)).code == code
        assert (await second.socket.receive()).type is aiohttp.WSMsgType.CLOSED


async def test_a_deleted_job_is_forgotten_everywhere(server: MasterServer) -> None:
    async with FakeAggregator(server.url, "one") as one, FakeAgent(server.url) as agent:
        await agent.enlist(job_spec())
        await agent.placed()
        async with aiohttp.ClientSession() as session:
            async with session.delete(f"{server.url}/v1/jobs/lm") as answer:
                assert answer.status == 200
            await one.heard(Drop)
            assert (await agent.heard(Denied)).code == "unknown_job"
            async with session.get(f"{server.url}/v1/jobs/lm") as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")


async def _json(session: aiohttp.ClientSession, url: str) -> dict[str, object]:
    async with session.get(url) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        return found


async def test_a_job_that_cannot_be_is_denied(server: MasterServer) -> None:
    async with FakeAgent(server.url) as agent:
        await agent.enlist(msgspec.structs.replace(job_spec(), optimizer="magic"))
        assert "optimizer is 'magic'" in (await agent.heard(Denied)).message
    assert not server.master.state.jobs
