"""`computron parameter-service`, as it is typed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from computron.cli import app
from computron.parameter_service.master.server import MasterServer, MasterSettings
from tests.parameter_service.master.fakes import KEY, FakeAgent, FakeAggregator, job_spec

START = 60.0  # seconds: the machine may be busy


def run(*words: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["parameter-service", *words])
    return result.exit_code, " ".join(result.output.split())


async def beside(tmp_path: Path, look: Callable[[str], Awaitable[None]]) -> None:
    """`look` at a master that has one job, a step, and two aggregators."""
    async with (
        MasterServer(MasterSettings(log=tmp_path / "log", port=0, key=KEY)) as server,
        FakeAggregator(server.url, "one"),
        FakeAggregator(server.url, "two"),
        FakeAgent(server.url) as agent,
    ):
        await agent.enlist(job_spec())
        await agent.placed()
        await look(server.url)


async def typed(url: str, *words: str) -> tuple[int, str]:
    return await asyncio.to_thread(run, *words, "--url", url)


async def test_jobs_and_aggregators_are_shown(tmp_path: Path) -> None:
    async def look(url: str) -> None:
        assert "lm running 1 0 - - - 10.0% 0.0 s one: 4 0 0" in (await typed(url, "jobs"))[1]
        code, shown = await typed(url, "top", "--once")
        assert code == 0
        assert "2 of 1 aggregators, 1 jobs" in shown
        assert "one up - 0 MiB of 1024 MiB lm 4" in shown
        assert "two up - 0 MiB of 1024 MiB - 0" in (await typed(url, "aggregators"))[1]
        assert "2 of 1 aggregators, 1 jobs" in (await typed(url, "top"))[1]  # no terminal: once
        assert (await typed(url, "versions", "lm")) == (0, "version step published file")
        with await asyncio.to_thread(urllib.request.urlopen, f"{url}/metrics") as answer:
            metrics = answer.read().decode()
        assert 'computron_ps_jobs{state="running"} 1.0' in metrics
        assert "computron_ps_aggregators_wanted 1.0" in metrics
        assert 'computron_ps_job_loss_limit_ratio{job="lm"} 0.1' in metrics

    await beside(tmp_path, look)


async def test_a_job_that_waits_for_its_workers_tells_how_many_have_come(tmp_path: Path) -> None:
    async def look(url: str) -> None:
        async with FakeAgent(url) as agent:
            await agent.enlist(job_spec("late", workers=2))
            async with asyncio.timeout(START):
                while "late gathering: 1 of 2 workers have" not in (await typed(url, "jobs"))[1]:
                    await asyncio.sleep(0.01)

    await beside(tmp_path, look)


async def test_blocks_are_moved_aggregators_drained_and_jobs_deleted(tmp_path: Path) -> None:
    async def look(url: str) -> None:
        assert (
            "nothing is to be moved: these blocks are at one, or on their way there"
            in (await typed(url, "move", "lm", "--to", "one"))[1]
        )
        assert await typed(url, "move", "lm", "--blocks", "0,1", "--to", "two") == (0, "2 blocks are on their way")
        assert await typed(url, "drain", "one", "--wait", "10") == (0, "one is empty")
        code, said = await typed(url, "drain", "nobody")
        assert (code, "error: there is no aggregator nobody; the aggregators are" in said) == (1, True)
        assert await typed(url, "delete", "lm") == (0, "lm is deleted")
        code, said = await typed(url, "delete", "lm")
        assert (code, "there is no job lm" in said) == (1, True)

    await beside(tmp_path, look)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["move", "lm", "--to", "three"], "there is no aggregator three; the aggregators are one, two"),
        (["move", "lm", "--to", "two", "--blocks", "9"], "job lm has blocks 0 to 3, not 9"),
        (["move", "lm", "--to", "two", "--blocks", "x"], '"x" is not like 0,3,4'),
        (["drain", "three"], "there is no aggregator three; the aggregators are one, two"),
        (["versions", "nobody"], "there is no job nobody; the jobs are lm"),
    ],
)
async def test_what_is_asked_wrongly_is_answered_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    async def look(url: str) -> None:
        code, answer = await typed(url, *words)
        assert code in (1, 2)
        assert said in answer

    await beside(tmp_path, look)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jobs", "--url", "127.0.0.1:9"], "no master at http://127.0.0.1:9"),
        (["master", "--aggregators", "3:1"], "--aggregators: 3:1"),
        (["master", "--aggregators", "few"], '"few" is not like 1:4'),
        (["master", "--memory", "much"], "--memory"),
        (["master", "--idle", "long"], "--idle"),
        (["aggregator", "--master", "127.0.0.1:9"], "the service's key is missing"),
    ],
)
def test_a_wrong_option_is_told(words: list[str], said: str) -> None:
    code, answer = run(*words)
    assert code in (1, 2)
    assert said in answer


@pytest.mark.parametrize("command", ["master", "aggregator"])
def test_a_folder_of_snapshots_that_is_none_is_told_at_once(command: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    words = [command] if command == "master" else [command, "--master", "127.0.0.1:9", "--key", KEY]
    code, answer = run(*words, "--log" if command == "master" else "--identity", "log", "--snapshots", str(file))
    assert code == 1
    assert "is a file, not a folder" in answer
    code, answer = run(*words, "--snapshots", str(file / "folder"))
    assert code == 1
    assert "cannot be made" in answer


class Command:
    """A master in a process of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        words = ["parameter-service", "master", "--log", str(folder / "log"), "--port", str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "computron", *words, "--aggregators", "1:1"], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1]

    def aggregator(self) -> dict[str, Any]:
        """As soon as it is up."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"{self.url}/v1/aggregators") as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]
            if found and found[0]["state"] == "up":
                return found[0]
            time.sleep(0.05)
        raise TimeoutError

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return self.process.wait(START)


@pytest.fixture
def leftovers() -> Iterator[list[int]]:
    """Processes that a test leaves are ended."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_aggregators_outlive_a_killed_master_and_are_found_again(tmp_path: Path, leftovers: list[int]) -> None:
    first = Command(tmp_path, 0)
    pid = first.aggregator()["pid"]
    leftovers.append(pid)
    first.end(signal.SIGKILL)
    again = Command(tmp_path, int(first.url.rpartition(":")[2]))
    leftovers.append(again.process.pid)
    assert again.aggregator()["pid"] == pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + START
    while (fresh := again.aggregator()["pid"]) == pid and time.monotonic() < deadline:
        time.sleep(0.05)
    leftovers.append(fresh)
    assert fresh != pid
    assert again.end(signal.SIGTERM) == 0
    os.kill(fresh, 0)  # it goes on
