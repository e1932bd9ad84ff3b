"""One process per model, started when a request names it and stopped to make room for another, as llama-swap does.

Up to `room` processes run at once. A request to a model without one waits until its process answers; the process used
least recently of those that answer nothing at the moment is stopped first. Requests and answers are passed on as they
are. What a process is, `command` says: by default the plain server beside this one, with a single model.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

HOST = "127.0.0.1"
PLAIN = Path(__file__).parents[1] / "torch_to" / "server.py"
START_SECONDS = 180
POLL_SECONDS = 0.1


@dataclass(eq=False)
class Process:
    port: int
    running: asyncio.subprocess.Process
    in_flight: int = 0
    used: float = 0.0
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class Switcher:
    def __init__(self, settings: dict[str, Any], session: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._session = session
        self._processes: dict[str, Process] = {}
        self._changed = asyncio.Condition()
        self._stats = {"loads": 0, "bytes": 0}
        self._ending = False

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        model = json.loads(body)["model"]
        process = await self._acquire(model)
        try:
            await process.ready.wait()
            url = f"http://{HOST}:{process.port}{request.path}"
            async with self._session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")
        finally:
            process.in_flight -= 1
            process.used = time.monotonic()
            async with self._changed:
                self._changed.notify_all()

    async def stats(self, request: web.Request) -> web.Response:
        return web.json_response(self._stats)

    async def _acquire(self, model: str) -> Process:
        """The model's process, perhaps not ready yet, with this request counted in it."""
        async with self._changed:
            while True:
                if self._ending:
                    raise web.HTTPServiceUnavailable
                if model in self._processes:
                    if self._processes[model].running.returncode is None:
                        break
                    del self._processes[model]  # it ended by itself
                if len(self._processes) < self._settings["room"]:
                    self._processes[model] = await self._start(model)
                    break
                idle = [name for name, process in self._processes.items() if process.in_flight == 0]
                if idle:
                    await _stop(self._processes.pop(min(idle, key=lambda name: self._processes[name].used)))
                else:
                    await self._changed.wait()
            self._processes[model].in_flight += 1
            return self._processes[model]

    async def _start(self, model: str) -> Process:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
        running = await asyncio.create_subprocess_exec(*self._command(model, port), start_new_session=True)
        process = Process(port, running)
        asyncio.create_task(self._wait_until_ready(process))  # noqa: RUF006
        self._stats["loads"] += 1
        folder = Path(self._settings["models"][model])
        self._stats["bytes"] += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return process

    def _command(self, model: str, port: int) -> list[str]:
        folder = self._settings["models"][model]
        if command := self._settings.get("command"):
            return [part.format(model=model, folder=folder, port=port) for part in command]
        alone = {key: self._settings[key] for key in ("task", "dtype", "threads", "max_batch_size")}
        return [sys.executable, str(PLAIN), json.dumps({**alone, "models": {model: folder}, "room": 1, "port": port})]

    async def _wait_until_ready(self, process: Process) -> None:
        path = self._settings.get("ready", "/stats")
        deadline = time.monotonic() + START_SECONDS
        while process.running.returncode is None and time.monotonic() < deadline:
            try:
                async with self._session.get(f"http://{HOST}:{process.port}{path}") as answer:
                    if answer.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(POLL_SECONDS)
        process.ready.set()  # what waits for a process that did not start finds nobody there, and says so

    async def stop_all(self) -> None:
        self._ending = True
        async with self._changed:
            for process in self._processes.values():
                await _stop(process)


async def _stop(process: Process) -> None:
    """Nothing is lost with a process that answers nothing: it is killed, with its children, which is quickest."""
    if process.running.returncode is None:
        os.killpg(process.running.pid, signal.SIGKILL)
    await process.running.wait()


async def start(settings: dict[str, Any]) -> web.Application:
    app = web.Application()

    async def run(_: web.Application) -> Any:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            switcher = Switcher(settings, session)
            app["switcher"] = switcher
            yield
            await switcher.stop_all()

    app.cleanup_ctx.append(run)
    for route in ("/v1/completions", "/v1/embeddings"):
        app.router.add_post(route, lambda request: app["switcher"].answer(request))
    app.router.add_get("/stats", lambda request: app["switcher"].stats(request))
    return app


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    web.run_app(start(given), host=HOST, port=given["port"], print=None, access_log=None, shutdown_timeout=1)
