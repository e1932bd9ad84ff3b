from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from computron import cli
from computron.config import Config, GroupConfig
from computron.errors import ConfigError
from computron.group.environment import Place
from computron.group.launch import WARM, Meeting, Share, launch, reserved, serve_command, share_of, threads_per_node

STAND_IN = Path(__file__).parent / "stand_in.py"


def test_one_host_runs_the_whole_group():
    assert share_of(4) == share_of(4, asked=4) == share_of(4, hosts=["a"], host_rank=0) == Share(0, 4, 4, Meeting())


def test_several_hosts_run_equal_shares_in_their_order():
    shares = [share_of(4, hosts=["a", "b"], host_rank=rank) for rank in (0, 1)]
    assert [list(share.ranks) for share in shares] == [[0, 1], [2, 3]]
    assert {share.meeting for share in shares} == {Meeting("a", 29500)}


@pytest.mark.parametrize(
    ("text", "meeting"),
    [
        ("leader:1234", Meeting("leader", 1234)),
        ("10.0.0.1:0", Meeting("10.0.0.1", 0)),
        ("[fd00::1]:1234", Meeting("fd00::1", 1234)),
    ],
)
def test_the_meeting_point_can_be_chosen(text, meeting):
    assert share_of(2, rendezvous=text).meeting == meeting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asked": 3}, "--nodes is 3.* makes 4"),
        ({"hosts": ["a", "b"]}, "say with --host-rank"),
        ({"hosts": ["a", "b"], "host_rank": 2}, "--host-rank is 2, but --hosts names only 2"),
        ({"hosts": ["a", "b", "c"], "host_rank": 0}, "4 nodes cannot be spread evenly over 3 hosts"),
        ({"host_rank": 1}, "--host-rank needs --hosts"),
        ({"rendezvous": "leader"}, "must look like host:port"),
        ({"rendezvous": "leader:99999"}, "must look like host:port"),
        ({"rendezvous": "fd00::1:1234"}, "must look like host:port"),
        ({"hosts": ["a", "b"], "host_rank": 0, "rendezvous": "a:0"}, "port 0"),
    ],
)
def test_what_cannot_be_is_said_in_terms_of_the_options(options, message):
    with pytest.raises(ConfigError, match=message):
        share_of(4, **options)


def test_each_node_is_told_its_place():
    share = share_of(4, hosts=["a", "b"], host_rank=1, rendezvous="a:7000")
    environments = share.environments(threads=3)
    places = [Place.from_environment(environment, nodes=4) for environment in environments.values()]
    assert places == [Place(2, 4, 0, 2, "a", 7000), Place(3, 4, 1, 2, "a", 7000)]
    assert environments[3]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("given", "threads"), [(None, 2), ("", 2), ("7", 7), ("many", 2)])
def test_cores_are_divided_among_nodes_unless_the_user_says_otherwise(monkeypatch, given, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads_per_node(4) == threads
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_per_node(100) == 1


def test_a_node_s_command_repeats_the_options_that_were_given():
    command = serve_command(Path("x.toml"), {"host": None, "port": 0, "log-level": "debug"})
    assert command == [sys.executable, "-P", "-m", "computron", "serve", "x.toml", "--port=0", "--log-level=debug"]


async def test_a_leader_can_listen_on_the_reserved_port_again_and_again():
    with reserved("127.0.0.1") as meeting:
        for _ in range(2):
            server = await asyncio.start_server(lambda reader, writer: writer.close(), meeting.host, meeting.port)
            reader, writer = await asyncio.open_connection(meeting.host, meeting.port)
            assert not await reader.read()
            writer.close()
            server.close()
            await server.wait_closed()


def test_a_reserved_port_is_nobody_else_s():
    with reserved("127.0.0.1") as meeting, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((meeting.host, meeting.port))


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_host_cannot_be_met_at(host):
    with pytest.raises(ConfigError, match=f"no port for the nodes to meet on {host}"), reserved(host):
        pass


def test_a_launch_tells_all_nodes_of_one_free_port(tmp_path):
    command = [sys.executable, str(STAND_IN), str(tmp_path), '{"0": {"exit": 0}, "1": {"exit": 0}}']
    config = Config(group=GroupConfig(tensor_parallel=2))
    assert launch(config, share_of(2), command) == 0
    environments = [json.loads(path.read_text())["environment"] for path in tmp_path.glob("[01].0")]
    (port,) = {environment["MASTER_PORT"] for environment in environments}
    assert int(port) > 0


@pytest.fixture
def launched(monkeypatch) -> list[Any]:
    """What the command would launch."""
    calls: list[Any] = []

    def record(config: Config, share: Share, command: list[str], libraries: list[str]) -> int:
        calls.append((config, share, command, libraries))
        return 3

    monkeypatch.setattr("computron.group.launch.launch", record)
    return calls


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text('[group]\ntensor_parallel = 2\n[[models]]\nid = "a"\nsource = "random:tiny"\n')
    return path


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["launch", *map(str, arguments)])


def test_the_command_launches_this_host_s_nodes(launched, file):
    result = run(file, "--hosts", "a, b", "--host-rank", 1, "--rendezvous", "a:7", "--port", 9000)
    assert result.exit_code == 3
    ((config, share, command, _),) = launched
    assert config.group.nodes == 2
    assert share == Share(1, 1, 2, Meeting("a", 7))
    assert command[-2:] == [str(file), "--port=9000"]


def test_the_libraries_of_a_node_can_be_loaded_before_a_fork(launched, file):
    run(file)
    ((*_, libraries),) = launched
    program = f"import {', '.join(libraries)}; from computron.group.warm import why_not; print(why_not())"
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | WARM, capture_output=True, text=True, check=True
    )
    assert result.stdout == "None\n"


def test_a_wrong_option_is_told_with_the_file_s_line_where_it_is_about_that(launched, file):
    result = run(file, "--nodes", 3)
    assert result.exit_code == 3
    assert f"{file}:1: --nodes is 3" in result.stderr
    assert not launched


def test_a_wrong_configuration_starts_nothing(launched, file):
    file.write_text("[group]\ntensor_parallel = 0\n")
    result = run(file)
    assert result.exit_code == 3
    assert "tensor_parallel: must be at least 1" in result.stderr
    assert not launched


def test_help_has_examples_and_says_whose_memory_it_is():
    text = " ".join(run("--help").output.split())
    assert "computron launch serve.toml" in text
    assert "each node" in text
