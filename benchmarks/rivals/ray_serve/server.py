"""Ray Serve with `@serve.multiplexed`: one replica, its LRU of models, and `@serve.batch`, which batches per model.

Loading a model moves the module that the replica keeps in host memory to the device (`moving.Model`): quicker than
reading the checkpoint, as Ray's own example does. Inside a batch Ray runs the parts of different models at once; here
one of them computes, on all threads, while the next one's model is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

sys.path.insert(0, str(Path(__file__).parents[1]))

from moving import Body, Model, Settings, load, settings_from_arguments

OPEN_REQUESTS = 1024  # none waits outside the replica, so that batches are as large as they can be
OBJECT_STORE_BYTES = 100 << 20
QUIET = {"log_level": "WARNING", "enable_access_log": False}
AT_ONCE = 2  # parts of a batch: one computes, one loads


def deployment(settings: Settings) -> serve.Application:
    @serve.deployment(max_ongoing_requests=OPEN_REQUESTS, ray_actor_options={"num_cpus": 0}, logging_config=QUIET)
    class Multiplexed:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(settings.threads)
            self._models = load(settings)
            self._loader, self._computer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
            self._places = asyncio.Semaphore(AT_ONCE)
            self._stats = {"loads": 0, "bytes": 0}

        @serve.multiplexed(max_num_models_per_replica=settings.room)
        async def model(self, name: str) -> Loaded:
            model = self._models[name]
            await asyncio.get_running_loop().run_in_executor(self._loader, model.to_device)
            self._stats["loads"] += 1
            self._stats["bytes"] += model.nbytes
            return Loaded(model)

        @serve.batch(max_batch_size=settings.max_batch_size, batch_wait_timeout_s=0.0)
        async def answers(self, bodies: list[Body]) -> list[dict[str, Any]]:
            name = serve.get_multiplexed_model_id()
            async with self._places:
                loaded = await self.model(name)
                return await asyncio.get_running_loop().run_in_executor(self._computer, loaded.model.answers, bodies)

        async def __call__(self, request: Request) -> dict[str, Any]:
            if request.url.path == "/stats":
                return self._stats
            return await self.answers(await request.json())

    return Multiplexed.bind()


class Loaded:
    """What Ray's LRU holds. It calls `__del__` of what it unloads."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __del__(self) -> None:
        self.model.to_host()


def main() -> None:
    settings = settings_from_arguments()
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent)))
    ray.init(
        num_cpus=settings.threads,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(settings.threads)}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": settings.port}, logging_config=QUIET)
    serve.run(deployment(settings), route_prefix="/")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
