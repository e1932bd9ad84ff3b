"""A real HTTP server on an ephemeral port over a node whose answers a test writes down."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp
import openai
import pytest

from computron.api.app import make_app
from computron.api.server import listen, url
from computron.config import ModelConfig, ServerConfig, Task
from computron.errors import BadRequest, ModelNotFound, Unavailable
from computron.execution.requests import (
    ClassOutput,
    CustomOutput,
    EmbeddingOutput,
    GenerateJob,
    Job,
    Output,
    TextOutput,
    TokenLogprob,
)
from computron.metrics import Metrics
from computron.models.text import GenerationDefaults
from computron.node.handle import RequestHandle
from computron.node.snapshot import ModelSnapshot, NodeSnapshot, NodeState
from computron.node.wire import Figures

CONTEXT = 100
ANSWER = "The answer is 42."


class FakeModel:
    """A token for each character; a chat is `role: content` lines; an image is its bytes."""

    def __init__(self, model: str, task: Task, *, takes_images: bool = False) -> None:
        self.plan = SimpleNamespace(
            config=ModelConfig(id=model, source=f"org/{model}", task=task),
            max_model_len=0 if takes_images or task == "custom" else CONTEXT,
            generation=GenerationDefaults(),
            labels=("cat", "dog", "fish"),
            takes_images=takes_images,
        )
        self.executor = SimpleNamespace(max_len=self.plan.max_model_len if task == "generate" else 0)
        self.loaded = self
        self.batch_manager = self
        self.template_arguments: dict[str, Any] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if any(token > 0x10FFFF for token in ids):
            raise BadRequest("no such token", param="tokens")
        return "".join(map(chr, ids))

    def render_chat(self, messages: Sequence[Any], **arguments: Any) -> str:
        self.template_arguments = arguments
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)

    def pixels(self, data: bytes) -> bytes:
        if not data.startswith(b"image"):
            raise BadRequest("the input is not an image that can be read")
        return data

    def parse(self, body: Any) -> Any:
        if not isinstance(body, dict):
            raise BadRequest("the body must be a JSON object")
        return body


Script = Callable[["Submitted"], Awaitable[None]]


@dataclass
class Submitted:
    """A job that reached the node, and the means to answer it."""

    node: FakeNode
    model: str
    job: Any
    handle: RequestHandle
    priority: int
    deadline: float | None
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, output: Output) -> None:
        self.handle.put(output)

    def finish(self, error: Exception | None = None) -> None:
        self.node.end(self.handle, error)


class FakeNode:
    """Answers each job by `script`, on the event loop, through the real node's request handles."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.models = {
            model.plan.config.id: model
            for model in (
                FakeModel("chat", "generate"),
                FakeModel("embed", "embed"),
                FakeModel("texts", "classify"),
                FakeModel("images", "classify", takes_images=True),
                FakeModel("team/echo", "custom"),
            )
        }
        self.state = NodeState.READY
        self.script: Script = answer_fully
        self.submitted: list[Submitted] = []
        self.most_open = 0
        self.arrived = asyncio.Condition()
        self.open: dict[RequestHandle, Submitted] = {}
        self.orders: list[tuple[str, str]] = []
        self.transferred = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        return self.state is NodeState.READY

    def model(self, model: str) -> FakeModel:
        if model not in self.models:
            raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
        return self.models[model]

    def submit(
        self, model: str, job: Job, *, request_id: str, priority: int = 0, deadline: float | None = None
    ) -> RequestHandle:
        if not self.ready:
            raise Unavailable("the server is shutting down", retry_after=1.0)
        number = len(self.submitted)
        handle = RequestHandle(number, request_id, model, 0.0, self._cancelled)
        submitted = Submitted(self, model, job, handle, priority, deadline)
        self.submitted.append(submitted)
        self.open[handle] = submitted
        self.most_open = max(self.most_open, len(self.open))
        self._idle.clear()
        task = asyncio.get_running_loop().create_task(self._run(submitted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return handle

    async def _run(self, submitted: Submitted) -> None:
        async with self.arrived:
            self.arrived.notify_all()
        await self.script(submitted)

    def _cancelled(self, handle: RequestHandle) -> None:
        self.open[handle].cancelled.set()
        self.end(handle, None)

    def end(self, handle: RequestHandle, error: Any) -> None:
        if self.open.pop(handle, None) is not None:
            handle.finish(1.0, error)
        if not self.open:
            self._idle.set()

    async def wait_for(self, count: int) -> Submitted:
        """The submitted job of that number, from 1, once it is there."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.submitted) >= count)
        return self.submitted[count - 1]

    def load(self, model: str) -> None:
        self.orders.append(("load", model))

    def unload(self, model: str) -> None:
        self.orders.append(("unload", model))

    def snapshot(self) -> NodeSnapshot:
        models = tuple(
            ModelSnapshot(name, model.plan.config.task, "partial", 1000, 8, 4, 64.0, True, 0.25, 3, 1)
            for name, model in self.models.items()
        )
        failure = "the link is broken" if self.state is NodeState.FAILED else None
        return NodeSnapshot(
            state=self.state,
            reason=failure,
            requests=len(self.open),
            models=models,
            nodes={
                0: Figures(
                    device_memory={"free": 10},
                    host_memory={"used": 20},
                    pages_shared=5,
                    transfer_bytes=77,
                    swaps={"done": 4, "failed": 2, "cancelled": 1},
                    link_busy_seconds=1.5,
                    host_pages_on_disk=6,
                )
            },
            frames=32,
            page_bytes=128,
            stages=1,
        )

    async def startup(self, progress: Any = None) -> None:
        if progress is not None:
            progress("chat", 10, 10)

    async def leave(self) -> None: ...

    async def shutdown(self, drain: float) -> None:
        self.state = NodeState.DRAINING
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain):
                await self._idle.wait()
        for handle in list(self.open):
            self.end(handle, Unavailable("the server is shutting down", retry_after=1.0))


def text_outputs(job: GenerateJob, text: str = ANSWER) -> list[TextOutput]:
    """The text, a word an output, cut at `max_tokens` words."""
    words = [word if index == 0 else f" {word}" for index, word in enumerate(text.split(" "))]
    reason = "length" if job.sampling.max_tokens < len(words) else "stop"
    words = words[: job.sampling.max_tokens]
    outputs: list[TextOutput] = []
    for index, word in enumerate(words):
        logprobs: tuple[TokenLogprob, ...] = ()
        if job.sampling.logprobs is not None:
            best = ((index, word, -0.5), (900, "x", -2.0), (901, "y", float("-inf")))
            logprobs = (TokenLogprob(index, word, -0.5, best[: job.sampling.logprobs]),)
        prompt = None
        if index == 0 and job.sampling.prompt_logprobs is not None:
            prompt = (None, *(TokenLogprob(token, chr(token), -1.0, ((7, "q", -0.1),)) for token in job.prompt[1:]))
        outputs.append(
            TextOutput(0, (index,), word, logprobs, prompt, reason if index == len(words) - 1 else None)  # type: ignore[arg-type]
        )
    return outputs


async def answer_fully(submitted: Submitted) -> None:
    """What a healthy node does."""
    job = submitted.job
    if isinstance(job, GenerateJob):
        for output in text_outputs(job):
            submitted.put(output)
    elif submitted.model == "embed":
        submitted.put(EmbeddingOutput(0, [0.5, float(len(job.tokens)), -1.25]))
    elif submitted.model in ("texts", "images"):
        submitted.put(ClassOutput(0, [0.2, 0.7, 0.1]))
    else:
        submitted.put(CustomOutput(0, job.payload))
    submitted.finish()


@dataclass
class Server:
    url: str
    node: FakeNode
    metrics: Metrics
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """(status, JSON, headers); `body` is sent as it is if it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.url + path, data=data, headers=sent) as response:
            return response.status, await response.json(), response.headers

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.get(self.url + path, headers=sent) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.url.removeprefix("http://").split(":")
        return await asyncio.open_connection(host, int(port))

    @property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0)


@contextlib.asynccontextmanager
async def run_server(**settings: Any) -> AsyncIterator[Server]:
    """A server with these settings of ServerConfig, listening on a free port."""
    node, metrics = FakeNode(), Metrics()
    app = make_app(node, ServerConfig(port=0, **settings), metrics)
    runner = await listen(app, "127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession() as session:
            yield Server(url(runner), node, metrics, session)
    finally:
        await runner.cleanup()
        app.close()


@pytest.fixture(name="run_server")
def run_server_fixture() -> Any:
    return run_server


@pytest.fixture
async def fake_node() -> FakeNode:
    return FakeNode()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with run_server() as server:
        yield server
        assert not server.node.open, f"left open: {server.node.open}"
