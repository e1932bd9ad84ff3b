"""Groups of real node processes on this machine, forked from one that has imported everything already."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from computron.config import Config
from tests.ports import ports_in_a_row

STARTING = 120.0  # seconds
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.end_to_end.node_process"])


class Group:
    """The nodes of a group, started one by one. Requests go to the leader over HTTP."""

    def __init__(self, config: Config, logs: Path) -> None:
        port = ports_in_a_row(2)
        self.config = replace(config, server=replace(config.server, port=port, log_level="info"))
        self.logs = logs
        self._master_port = port + 1
        self._processes: dict[int, Any] = {}
        self.session: aiohttp.ClientSession

    @property
    def size(self) -> int:
        return self.config.group.nodes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.server.port}"

    def start(self, rank: int, config: Config | None = None) -> None:
        """Start a node, with a configuration of its own if one is given."""
        from tests.end_to_end.node_process import serve_node

        environment = {
            "RANK": rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": self.size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._master_port,
            "COMPUTRON_RESTARTS": int(rank in self._processes),
        }
        own = config or self.config
        if rank:
            own = replace(own, server=replace(own.server, port=0))
        process = _context.Process(target=serve_node, args=(own, environment, str(self.logs / f"node-{rank}.log")))
        process.start()
        self._processes[rank] = process

    def pid(self, rank: int) -> int:
        return int(self._processes[rank].pid)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def kill(self, rank: int) -> None:
        self.signal(rank, signal.SIGKILL)
        self._processes[rank].join()

    async def ended(self, rank: int, timeout: float = 60.0) -> int:
        """The node's exit code, once it has ended."""
        process = self._processes[rank]
        async with asyncio.timeout(timeout):
            while process.exitcode is None:
                await asyncio.sleep(0.02)
        return int(process.exitcode)

    async def ready(self, timeout: float = STARTING) -> None:
        """Wait until the group takes requests."""
        deadline = time.monotonic() + timeout
        state = ""
        while time.monotonic() < deadline:
            try:
                async with self.session.get(f"{self.url}/health/ready") as response:
                    state = await response.text()
                    if response.status == 200:
                        return
            except aiohttp.ClientError as error:
                state = repr(error)
            assert self._processes[0].exitcode is None, f"the leader has ended:\n{self.log(0)}"
            await asyncio.sleep(0.05)
        raise AssertionError(f"not ready after {timeout} s: {state}\n" + "\n".join(map(self.log, range(self.size))))

    def log(self, rank: int) -> str:
        file = self.logs / f"node-{rank}.log"
        return f"--- node {rank}\n" + (file.read_text()[-4000:] if file.exists() else "")

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    async def state(self) -> tuple[int, Any]:
        """Status and body of /health/ready; 0 while nobody listens."""
        try:
            async with self.session.get(f"{self.url}/health/ready") as response:
                return response.status, await response.json()
        except aiohttp.ClientError:
            return 0, None

    async def metric(self, name: str) -> dict[str, float]:
        """Values by labels, as the leader exposes them."""
        async with self.session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        return {m[1] or "": float(m[2]) for m in re.finditer(rf"^{name}(?:\{{(.*?)\}})? (\S+)$", text, re.MULTILINE)}

    async def tokens(self, model: str, prompt: list[int], count: int, **settings: Any) -> list[int]:
        """What the model answers greedily."""
        status, body = await self.post(
            "/v1/completions",
            model=model, prompt=prompt, max_tokens=count, temperature=0, return_token_ids=True, **settings,
        )  # fmt: skip
        assert status == 200, body
        return list(body["choices"][0]["token_ids"])

    async def stop(self) -> None:
        """Stop the leader as an operator would; the other nodes must follow. Whoever is left is killed."""
        leader = self._processes.get(0)
        if leader is not None and leader.exitcode is None:
            self.signal(0, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await self.ended(0)
        stayed = []
        for rank, process in self._processes.items():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    while process.exitcode is None:
                        await asyncio.sleep(0.02)
            if process.exitcode is None:
                stayed.append(rank)
                process.kill()
                process.join()
        assert not stayed, f"nodes {stayed} did not follow their leader:\n" + "\n".join(map(self.log, stayed))


@contextlib.asynccontextmanager
async def group_of(config: Config, logs: Path) -> AsyncIterator[Group]:
    """A group that takes requests."""
    group = Group(config, logs)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as group.session:
        try:
            for rank in range(group.size):
                group.start(rank)
            await group.ready()
            yield group
        finally:
            await group.stop()
