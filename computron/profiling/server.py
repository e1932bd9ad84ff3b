"""A running server as whoever measures it sees it: over HTTP, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from computron.errors import ComputronError
from computron.profiling.questions import Question

PATIENCE = 120.0  # seconds for one answer, or for a model to come or leave
GLANCE = 0.01  # seconds between two looks at whether a model has come
COMMENT, DATA = b":", b"\ndata:"  # how lines of a stream begin that say nothing, and those that say something

Body = TypeVar("Body", bound=msgspec.Struct)


class CannotProfile(ComputronError):
    """The server cannot be measured. The message says why and what to do."""

    code = "cannot_profile"


class Details(msgspec.Struct, frozen=True):
    """A model as `/v1/models` tells of it."""

    id: str
    task: str
    state: str
    bytes: int
    pages: int
    segments: int
    cache_bytes_per_token: float
    overlaps: bool
    max_batch_size: int
    max_model_len: int | None
    resident_ratio: float
    pinned: bool
    queue_depth: int
    running: int


class _List(msgspec.Struct, frozen=True):
    data: list[Details]


class _Version(msgspec.Struct, frozen=True):
    version: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What the server has counted of one model since its start. others: requests in steps of each other model."""

    steps: int
    step_seconds: float
    step_requests: int
    swaps: int
    swap_seconds: float
    swap_bytes: int
    others: Mapping[str, int]

    def since(self, before: Counts) -> Counts:
        return Counts(
            self.steps - before.steps,
            self.step_seconds - before.step_seconds,
            self.step_requests - before.step_requests,
            self.swaps - before.swaps,
            self.swap_seconds - before.swap_seconds,
            self.swap_bytes - before.swap_bytes,
            {name: more for name, count in self.others.items() if (more := count - before.others.get(name, 0))},
        )

    def refuse_others(self, model: str) -> None:
        """Raises CannotProfile if, since what this was counted from, other models than this one had requests."""
        if self.others:
            names = ", ".join(sorted(self.others))
            raise CannotProfile(
                f"requests to {names} came while {model} was measured: measure a server that nobody else uses"
            )


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from the sending until the first event of a stream, or else the answer, and until the end of it."""

    first: float
    last: float


class Server:
    """Async context manager. Every method raises CannotProfile if the server does not answer as it should."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Server:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def models(self) -> list[Details]:
        return self._decoded(await self._call("GET", "/v1/models"), _List).data

    async def model(self, model: str) -> Details:
        return self._decoded(await self._call("GET", f"/v1/models/{quote(model)}"), Details)

    def _decoded(self, body: bytes, kind: type[Body]) -> Body:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise CannotProfile(f"{self.url} is no Computron server of this version: {error}") from error

    async def version(self) -> str:
        return self._decoded(await self._call("GET", "/version"), _Version).version

    async def load(self, model: str) -> None:
        """Bring all of it to the device."""
        await self._move(model, "load", 1.0)

    async def unload(self, model: str) -> None:
        """Take all of it off the device."""
        await self._move(model, "unload", 0.0)

    async def _move(self, model: str, order: str, ratio: float) -> None:
        details = self._decoded(await self._call("POST", f"/v1/models/{quote(model)}/{order}"), Details)
        deadline = time.monotonic() + PATIENCE
        while details.resident_ratio != ratio or details.state == "loading":
            if time.monotonic() > deadline:
                raise CannotProfile(
                    f"{order} of {model} did not end within {PATIENCE:g} s: measure a server that nobody else uses"
                )
            await asyncio.sleep(GLANCE)
            details = await self.model(model)

    async def metrics(self) -> Mapping[tuple[str, str], float]:
        """(name, model) -> value; the model is "" where there is none. Labels other than the model are summed over."""
        text = (await self._call("GET", "/metrics")).decode(errors="replace")
        values: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, sample.labels.get("model", ""))
                values[key] = values.get(key, 0.0) + sample.value
        return values

    async def counts(self, model: str) -> Counts:
        values = await self.metrics()

        def value(name: str) -> float:
            return values.get((f"computron_{name}", model), 0.0)

        return Counts(
            steps=round(value("step_seconds_count")),
            step_seconds=value("step_seconds_sum"),
            step_requests=round(value("batch_size_sum")),
            swaps=round(value("swap_in_seconds_count")),
            swap_seconds=value("swap_in_seconds_sum"),
            swap_bytes=round(value("swap_in_bytes_total")),
            others={
                other: round(count)
                for (name, other), count in values.items()
                if name == "computron_batch_size_sum" and other != model
            },
        )

    async def ask(self, question: Question) -> Answer:
        """Send it, and read the whole answer."""
        began = time.monotonic()
        try:
            async with self._session.post(
                self.url + question.path, data=question.body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    raise self._refused(question.path, response.status, await response.read())
                first = None
                async for piece in response.content.iter_any():
                    if first is None and (not piece.startswith(COMMENT) or DATA in piece):
                        first = time.monotonic()
                last = time.monotonic()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from error
        return Answer((last if first is None else first) - began, last - began)

    async def _call(self, method: str, path: str) -> bytes:
        try:
            async with self._session.request(method, self.url + path) as response:
                body = await response.read()
                if response.status >= 400:
                    raise self._refused(path, response.status, body)
                return body
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> CannotProfile:
        words = str(error) or type(error).__name__
        return CannotProfile(f"no server at {self.url}: {words}; start one, or give its address with --url")

    def _refused(self, path: str, status: int, body: bytes) -> CannotProfile:
        try:
            words = str(msgspec.json.decode(body)["error"]["message"])
        except (msgspec.DecodeError, KeyError, TypeError):
            words = " ".join(body.decode(errors="replace").split())[:200]
        if status == 401:
            return CannotProfile(f"{self.url} asks for an API key; give it with --api-key or COMPUTRON_API_KEY")
        return CannotProfile(f"{self.url}{path} answered {status}: {words}")
