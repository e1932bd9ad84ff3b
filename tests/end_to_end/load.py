"""Clients that keep asking while things break, and what becomes of each of their requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

import aiohttp
import openai

MODELS = "abc"
PROMPTS = [list(range(1 + n, 9 + 3 * n)) for n in range(3)]
TOKENS = 24
TIMEOUT = 60.0  # seconds after which a request counts as hanging
PAUSE = 0.1  # seconds that a client waits after a refusal; less than Retry-After asks for
NEWCOMERS = 0.25  # seconds between two clients that ask once

RIGHT, REFUSED, BROKEN, WRONG, HUNG = "right", "refused", "broken", "wrong", "hung"


@dataclass(frozen=True, slots=True)
class Question:
    model: str
    prompt: tuple[int, ...]


QUESTIONS = [Question(model, tuple(prompt)) for prompt in PROMPTS for model in MODELS]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`kind`: `right` tokens; `refused` by 503 with Retry-After, or by an error event within a stream; a `broken`
    connection; `wrong`: anything else; `hung`. `detail`: the server's words, or the error's. Times are monotonic.
    """

    kind: str
    asked: float
    ended: float
    detail: str = ""


class _Refused(Exception):
    pass


class Clients:
    """They ask the server at `url`. Half of what they ask is streamed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.outcomes: list[Outcome] = []
        self._expected: dict[Question, list[int]] = {}
        self._ended = asyncio.Event()  # set whenever a request has ended
        self._session: aiohttp.ClientSession

    async def learn(self) -> None:
        """Take what is answered now for right."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as self._session:
            for question in QUESTIONS:
                self._expected[question] = await self._answer(question, stream=False)

    @contextlib.asynccontextmanager
    async def asking(self, count: int = 3) -> AsyncIterator[None]:
        """`count` clients ask one question after the other meanwhile, and newcomers ask one each, so that some ask
        while the others wait. At the end the last ones get their answers.
        """
        self.outcomes = []
        stop = asyncio.Event()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as self._session:
            clients = [asyncio.ensure_future(self._client(number, stop)) for number in range(count)]
            clients.append(asyncio.ensure_future(self._newcomers(stop)))
            try:
                yield
            finally:
                stop.set()
                await asyncio.gather(*clients)

    async def _client(self, number: int, stop: asyncio.Event) -> None:
        questions = itertools.cycle(QUESTIONS[number:] + QUESTIONS[:number])
        stream = itertools.cycle((number % 2 == 0, number % 2 == 1))
        while not stop.is_set():
            if (await self._ask(next(questions), next(stream))).kind != RIGHT:
                await asyncio.sleep(PAUSE)

    async def _newcomers(self, stop: asyncio.Event) -> None:
        newcomers = []
        for question in itertools.cycle(QUESTIONS):
            if stop.is_set():
                break
            newcomers.append(asyncio.ensure_future(self._ask(question, stream=False)))
            await asyncio.sleep(NEWCOMERS)
        await asyncio.gather(*newcomers)

    async def _ask(self, question: Question, stream: bool) -> Outcome:
        outcome = await self._outcome(question, stream)
        self.outcomes.append(outcome)
        self._ended.set()
        return outcome

    async def _outcome(self, question: Question, stream: bool) -> Outcome:
        asked = time.monotonic()
        kind, detail = RIGHT, ""
        try:
            tokens = await self._answer(question, stream)
            if tokens != self._expected[question]:
                kind, detail = WRONG, f"{question}: {tokens} instead of {self._expected[question]}"
        except _Refused as refused:
            kind, detail = REFUSED, str(refused)
        except TimeoutError:
            kind = HUNG
        except (aiohttp.ClientError, OSError) as error:
            kind, detail = BROKEN, repr(error)
        except (AssertionError, KeyError, ValueError) as error:
            kind, detail = WRONG, f"{question}: {error!r}"
        return Outcome(kind, asked, time.monotonic(), detail)

    async def _answer(self, question: Question, stream: bool) -> list[int]:
        body = {"model": question.model, "prompt": question.prompt, "max_tokens": TOKENS, "temperature": 0,
                "return_token_ids": True, "stream": stream}  # fmt: skip
        async with self._session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status == 503:
                answer = await response.json()
                assert int(response.headers["Retry-After"]) > 0, answer
                raise _Refused(answer["error"]["message"])
            assert response.status == 200, f"{response.status} {await response.text()}"
            if not stream:
                return list((await response.json())["choices"][0]["token_ids"])
            return await self._streamed(response)

    async def _streamed(self, response: aiohttp.ClientResponse) -> list[int]:
        tokens: list[int] = []
        async for line in response.content:
            if line == b"data: [DONE]\n":
                return tokens
            if line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    assert chunk["error"]["type"] == "service_unavailable_error", chunk
                    raise _Refused(chunk["error"]["message"])
                tokens += chunk["choices"][0]["token_ids"]
        raise aiohttp.ClientPayloadError("the stream ended without its end mark")

    async def answered(self, since: float, timeout: float, count: int = 1) -> float:
        """Wait until this many requests that were made after `since` have been answered; when the last of them was."""
        async with asyncio.timeout(timeout):
            while True:
                found = sorted(o.ended for o in self.outcomes if o.kind == RIGHT and o.asked > since)
                if len(found) >= count:
                    return found[count - 1]
                self._ended.clear()
                await self._ended.wait()

    async def refused(self, timeout: float, *words: str) -> Outcome:
        """Wait until a request has been refused with all of these words."""
        async with asyncio.timeout(timeout):
            while True:
                for outcome in self.outcomes:
                    if outcome.kind == REFUSED and all(word in outcome.detail for word in words):
                        return outcome
                self._ended.clear()
                await self._ended.wait()

    def of(self, *kinds: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind in kinds]


async def official_answers(url: str) -> list[str]:
    """What each model writes to OpenAI's own client, whole and streamed alike."""
    texts = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=TIMEOUT) as client:
        for model in MODELS:
            whole = await client.completions.create(model=model, prompt="Once", max_tokens=TOKENS, temperature=0)
            stream = await client.completions.create(
                model=model, prompt="Once", max_tokens=TOKENS, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].text async for chunk in stream]
            assert whole.usage is not None
            assert whole.usage.completion_tokens == TOKENS
            assert len(pieces) > 2
            assert "".join(pieces) == whole.choices[0].text
            texts.append(whole.choices[0].text)
    return texts


def counted(outcomes: Iterable[Outcome], since: float = 0.0) -> str:
    counts = Counter(outcome.kind for outcome in outcomes if outcome.ended >= since)
    return ", ".join(f"{counts[kind]} {kind}" for kind in (RIGHT, REFUSED, BROKEN, WRONG, HUNG) if counts[kind])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, a line each row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
