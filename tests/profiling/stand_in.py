"""A server in numbers: it answers at once, and counts steps that would have taken as long as it is told."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from computron.simulation.hardware import StepTime

FRAME = 1 << 20
FRAMES = 64
BANDWIDTH = 2e9


class StandIn:
    """One model of each name in `steps`: those that begin with "chat" generate, those with "custom" take anything, the
    others embed. `tamper`: added to the counted requests of each step. `beside`: a model that is asked by somebody else
    whenever another one runs or is loaded.
    """

    def __init__(self, steps: dict[str, StepTime], *, key: str | None = None) -> None:
        self.steps = steps
        self.key = key
        self.tamper = 0
        self.beside: str | None = None
        self.pinned = False
        self.queue_depth = 0
        self.resident: dict[str, float] = dict.fromkeys(steps, 0.0)
        self.sizes = {name: (place + 1) * 4 * FRAME for place, name in enumerate(steps)}
        self.counted: dict[str, dict[str, float]] = {name: {} for name in steps}
        self.asked: list[str] = []

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._check])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model}", self._model)
        app.router.add_post("/v1/models/{model}/infer", self._infer)
        app.router.add_post("/v1/models/{model}/{order}", self._order)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/embeddings", self._embed)
        return app

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "the API key is missing or wrong"}}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    def _task(self, model: str) -> str:
        return "generate" if model.startswith("chat") else "custom" if model.startswith("custom") else "embed"

    def _details(self, model: str) -> dict[str, Any]:
        task = self._task(model)
        return {
            "id": model,
            "task": task,
            "state": "resident" if self.resident[model] else "absent",
            "bytes": self.sizes[model],
            "pages": self.sizes[model] // FRAME,
            "segments": 6,
            "cache_bytes_per_token": 512.0 if task == "generate" else 0.0,
            "overlaps": task == "embed",
            "max_batch_size": 4,
            "max_model_len": None if task == "custom" else 256,
            "resident_ratio": self.resident[model],
            "pinned": self.pinned,
            "queue_depth": self.queue_depth,
            "running": 0,
        }

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "1.2.3"})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [self._details(model) for model in self.steps]})

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(self._details(request.match_info["model"]))

    async def _order(self, request: web.Request) -> web.Response:
        model, order = request.match_info["model"], request.match_info["order"]
        before = self._details(model)
        if order == "load" and not self.resident[model]:
            self._count(model, "swap_in_seconds_count", 1)
            self._count(model, "swap_in_seconds_sum", 0.001 + self.sizes[model] / BANDWIDTH)
            self._count(model, "swap_in_bytes_total", self.sizes[model])
            self._disturb()
        self.resident[model] = float(order == "load")
        return web.json_response(before, status=202)

    def _disturb(self) -> None:
        if self.beside is not None:
            self._count(self.beside, "batch_size_sum", 1)

    def _count(self, model: str, what: str, amount: float) -> None:
        self.counted[model][what] = self.counted[model].get(what, 0.0) + amount

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [
            f"computron_device_frames {FRAMES}.0",
            f"computron_page_bytes {FRAME}.0",
            "computron_pipeline_stages 1.0",
        ]
        for model, counted in self.counted.items():
            lines += [f'computron_{what}{{model="{model}"}} {amount!r}' for what, amount in counted.items()]
        return web.Response(text="\n".join(lines) + "\n")

    def _step(self, model: str, requests: int, prompt: int, context: int = 0) -> None:
        self._disturb()
        self._count(model, "step_seconds_count", 1)
        self._count(model, "step_seconds_sum", self.steps[model].seconds(requests, prompt, context))
        self._count(model, "batch_size_sum", requests + self.tamper)

    async def _complete(self, request: web.Request) -> web.Response:
        """As a real server does it: the first prompt alone, the others in the step after it."""
        body = await request.json()
        prompts = [len(prompt) for prompt in body["prompt"]]
        more = body["max_tokens"]
        sequences: list[list[int]] = []  # tokens so far, and still to come
        waiting = [prompts[:1], prompts[1:]]
        while waiting or sequences:
            new = waiting.pop(0) if waiting else []
            if new or sequences:
                self._step(body["model"], len(new) + len(sequences), sum(new), sum(tokens for tokens, _ in sequences))
            sequences = [[tokens + 1, left - 1] for tokens, left in [*sequences, *([each, more] for each in new)]]
            sequences = [[tokens, left] for tokens, left in sequences if left]
        return self._answered(request)

    async def _embed(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompts = [len(prompt) for prompt in body["input"]]
        for part in (prompts[:1], prompts[1:]):
            if part:
                self._step(body["model"], len(part), sum(part))
        return self._answered(request)

    async def _infer(self, request: web.Request) -> web.Response:
        self.asked.append(json.dumps(await request.json()))
        self._step(request.match_info["model"], 1, 0)
        return self._answered(request)

    def _answered(self, request: web.Request) -> web.Response:
        return web.json_response({"path": request.path})
