"""A plain aiohttp server of many models: whole modules moved by `.to()`, the least recently used one leaves.

All models are in host memory; `room` of them are on the device (see `moving.Model` for what moving means without a
GPU). One thread computes: it takes the request that waits longest and with it all that wait for the same model, up to
`max_batch_size`, as one padded batch; it moves the model if it is away, then computes until the batch is done.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[1]))

from moving import Body, Model, Settings, load, settings_from_arguments


class Waiting(NamedTuple):
    model: str
    body: Body
    answer: asyncio.Future[dict[str, Any]]


class Server:
    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._models = load(settings)
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._stats = {"loads": 0, "bytes": 0}
        self._waiting: list[Waiting] = []
        self._arrived = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(body["model"], body, answer))
        self._arrived.set()
        return web.json_response(await answer)

    async def stats(self, request: web.Request) -> web.Response:
        return web.json_response(self._stats)

    async def main_loop(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while True:
                while not self._waiting:
                    self._arrived.clear()
                    await self._arrived.wait()
                batch = self._take_batch()
                try:
                    answers = await loop.run_in_executor(thread, self._run, batch)
                except Exception as error:
                    for waiting in batch:
                        waiting.answer.set_exception(error)
                    continue
                for waiting, answer in zip(batch, answers, strict=True):
                    if not waiting.answer.done():  # its client may be gone
                        waiting.answer.set_result(answer)

    def _take_batch(self) -> list[Waiting]:
        oldest = self._waiting[0].model
        batch = [waiting for waiting in self._waiting if waiting.model == oldest][: self._settings.max_batch_size]
        self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
        return batch

    def _run(self, batch: list[Waiting]) -> list[dict[str, Any]]:
        return self._load(batch[0].model).answers([waiting.body for waiting in batch])

    def _load(self, name: str) -> Model:
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        if len(self._loaded) == self._settings.room:
            self._loaded.popitem(last=False)[1].to_host()
        model = self._models[name]
        model.to_device()
        self._stats["loads"] += 1
        self._stats["bytes"] += model.nbytes
        self._loaded[name] = model
        return model


async def start(settings: Settings) -> web.Application:
    server = Server(settings)
    app = web.Application()
    for route in ("/v1/completions", "/v1/embeddings"):
        app.router.add_post(route, server.answer)
    app.router.add_get("/stats", server.stats)

    async def run(_: web.Application) -> Any:
        task = asyncio.create_task(server.main_loop())
        yield
        task.cancel()

    app.cleanup_ctx.append(run)
    return app


if __name__ == "__main__":
    settings = settings_from_arguments()
    app = start(settings)
    web.run_app(app, host="127.0.0.1", port=settings.port, print=None, access_log=None, shutdown_timeout=1)
