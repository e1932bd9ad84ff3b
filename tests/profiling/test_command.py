"""`computron bench profile`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from computron import cli
from computron.simulation.hardware import Profile, StepTime
from tests.profiling.conftest import Serving
from tests.profiling.stand_in import StandIn

CHAT = StepTime(0.01, per_prompt_token=2e-4, per_sequence=1e-3, per_context_token=3e-6, opening=4e-3)
CUSTOM = StepTime(0.003)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", "profile", *map(str, arguments)], env={"COLUMNS": "200"})


async def test_profile_is_written_and_shown(serving: Serving, tmp_path: Path) -> None:
    out, body = tmp_path / "profile.json", tmp_path / "body.json"
    body.write_text('{"text": "hello"}')
    server = StandIn({"chat": CHAT, "custom": CUSTOM}, key="secret")
    flags = ("--seconds", 0, "--pause", 0, "--body", f"custom={body}", "--api-key", "secret")
    async with serving(server) as address:
        result = await asyncio.to_thread(run, "--url", address, "--out", out, *flags)
    assert result.exit_code == 0, result.output
    assert [model.name for model in Profile.read(out).models] == ["chat", "custom"]
    for words in (
        "load of",
        "Steps of chat",
        "3 x 16 tokens",
        "2.000 GB/s",
        "10.00 ms + 4.00 ms if it takes in",
        "fit",
        "Steps of chat, 0 of ",
        "200 us a prompt token",
    ):
        assert words in result.output
    assert "warning" not in result.output


async def test_fit_that_misses_is_warned_of(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("computron.cli.bench.MISS", -1.0)
    async with serving(StandIn({"chat": CHAT})) as address:
        flags = ("--out", tmp_path / "profile.json", "--seconds", 0, "--pause", 0)
        result = await asyncio.to_thread(run, "--url", address, *flags)
    assert "warning: the fit misses by more than -100% for the steps of chat, the link: the machine was busy" in (
        result.stderr
    )


async def test_what_is_wrong_is_one_line(serving: Serving, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    async with serving(StandIn({"chat": CHAT})) as address:
        result = await asyncio.to_thread(run, "--url", address, "--out", out, "--models", "chat,nothing")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "serves no model 'nothing'; it has chat" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "flags", "words"),
    [
        ("none/profile.json", (), "there is no folder"),
        (".", (), "is a folder"),
        ("profile.json", ("--seconds", "inf"), "--seconds must be a number"),
        ("profile.json", ("--pause", "inf"), "--pause must be a number"),
    ],
)
async def test_what_is_asked_wrongly_is_told_before_anything_is_measured(
    serving: Serving, tmp_path: Path, out: str, flags: tuple[str, ...], words: str
) -> None:
    server = StandIn({"chat": CHAT})
    async with serving(server) as address:
        result = await asyncio.to_thread(run, "--url", address, "--out", tmp_path / out, *flags)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not server.counted["chat"]


@pytest.mark.parametrize(
    ("body", "words"),
    [("custom", "takes MODEL=FILE.json"), ("custom=none.json", "cannot be read"), ("custom=bad.json", "is no JSON")],
)
def test_body_that_is_wrong_is_told(body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    result = run("--out", "profile.json", "--body", body)
    assert result.exit_code == 2
    assert words in result.stderr
