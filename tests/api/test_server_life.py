"""Start, drain and end, by real signals; the node is a fake one, the sockets are not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import pytest

from computron.api.server import CannotListen, serve
from computron.config import ServerConfig
from computron.errors import CheckpointError
from computron.execution.requests import TextOutput
from computron.metrics import Metrics
from computron.node.snapshot import NodeState

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


class Watcher:
    """Says when the server is ready."""

    def __init__(self) -> None:
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.loaded: list[tuple[str, int, int]] = []
        self.closed = False

    def loading(self, model: str, done: int, total: int) -> None:
        self.loaded.append((model, done, total))

    def ready(self, url: str) -> None:
        self.url.set_result(url)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
async def life(fake_node):
    """A server that lives in this process until a signal comes."""

    class Life:
        node = fake_node
        watcher = Watcher()

        def __init__(self, **settings) -> None:
            config = ServerConfig(port=0, **settings)
            self.task = asyncio.create_task(serve(config, self.node, Metrics(), self.watcher))

        async def post(self, session, body=CHAT):
            async with session.post(await self.watcher.url + "/v1/chat/completions", json=body) as response:
                return response.status, await response.text()

    return Life


async def never(submitted) -> None: ...


async def test_it_tells_of_loading_and_stops_at_a_signal(life):
    server = life()
    await server.watcher.url
    os.kill(os.getpid(), signal.SIGTERM)
    assert await server.task == signal.SIGTERM
    assert server.watcher.loaded == [("chat", 10, 10)]
    assert server.watcher.closed


async def test_draining_lets_open_requests_end_and_refuses_new_ones(life):
    server = life(drain_timeout=60.0)
    server.node.script = never
    async with aiohttp.ClientSession() as session:
        asked = asyncio.create_task(server.post(session))
        submitted = await server.node.wait_for(1)
        os.kill(os.getpid(), signal.SIGTERM)
        url = await server.watcher.url
        while True:
            async with session.get(url + "/health/ready") as ready:
                if ready.status == 503:
                    break
        status, text = await server.post(session)
        assert (status, "shutting down" in text) == (503, True)
        submitted.put(TextOutput(0, (1,), "in time", finish_reason="stop"))
        submitted.finish()
        status, text = await asked
    assert (status, "in time" in text) == (200, True)
    assert await server.task == signal.SIGTERM


@pytest.mark.parametrize("stream", [False, True])
async def test_what_outlives_the_drain_gets_a_clear_error(life, stream):
    server = life(drain_timeout=0.01, keep_alive_interval=0.01)
    server.node.script = never
    async with aiohttp.ClientSession() as session:
        asked = asyncio.create_task(server.post(session, CHAT | {"stream": stream}))
        await server.node.wait_for(1)
        os.kill(os.getpid(), signal.SIGINT)
        status, text = await asked
    assert status in ((200, 503) if stream else (503,))  # a stream that has begun tells it as its last event
    assert "the server is shutting down" in text
    assert await server.task == signal.SIGINT


async def test_a_port_in_use_is_one_clear_error(fake_node):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen) as caught:
            await serve(ServerConfig(port=port), fake_node, Metrics(), Watcher())
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: the port is in use; stop what uses it, or choose another with --port"
    )


async def test_an_address_of_another_machine_is_one_clear_error(fake_node):
    with pytest.raises(CannotListen, match="this machine has no such address"):
        await serve(ServerConfig(host="192.0.2.1", port=0), fake_node, Metrics(), Watcher())


async def test_a_model_that_cannot_be_loaded_ends_the_start(fake_node):
    async def startup(progress=None):
        raise CheckpointError("model.safetensors is truncated")

    fake_node.startup = startup
    watcher = Watcher()
    with pytest.raises(CheckpointError, match="truncated"):
        await serve(ServerConfig(port=0), fake_node, Metrics(), watcher)
    assert watcher.closed
    assert fake_node.state is NodeState.DRAINING  # it was closed, with all that it had opened


PROGRAM = """
import asyncio, importlib.util, sys
spec = importlib.util.spec_from_file_location("fakes", {conftest!r})
fakes = importlib.util.module_from_spec(spec)
sys.modules["fakes"] = fakes
spec.loader.exec_module(fakes)
from computron.api.server import serve
from computron.config import ServerConfig
from computron.metrics import Metrics

class Printer:
    def loading(self, *figures): pass
    def ready(self, url): print(url, flush=True)
    def close(self): pass

async def never(submitted):
    print("submitted", flush=True)

async def forever(progress=None):
    print("starting", flush=True)
    await asyncio.Event().wait()

node = fakes.FakeNode()
node.script = never
if {stuck!r}:
    node.startup = forever
asyncio.run(serve(ServerConfig(port=0, drain_timeout=600.0), node, Metrics(), Printer()))
"""


async def start_process(stuck: bool) -> asyncio.subprocess.Process:
    program = PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py")), stuck=stuck)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )


async def test_a_second_signal_ends_at_once():
    process = await start_process(stuck=False)
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    async with aiohttp.ClientSession() as session:
        asked = asyncio.create_task(session.post(url + "/v1/chat/completions", json=CHAT))
        assert await process.stdout.readline() == b"submitted\n"
        process.send_signal(signal.SIGTERM)
        while True:
            async with session.get(url + "/health/ready") as ready:
                if ready.status == 503:
                    break
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 128 + signal.SIGTERM
        with pytest.raises(aiohttp.ClientError):
            await asked
    process._transport.close()


async def test_a_signal_during_the_start_ends_at_once():
    process = await start_process(stuck=True)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"starting\n"
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 128 + signal.SIGINT
    process._transport.close()
