"""A client that leaves frees its place at once, whatever its request was doing."""

from __future__ import annotations

import asyncio
import json

import pytest

from computron.execution.requests import TextOutput

STREAM = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def never(submitted) -> None:
    """A model that is never done."""


async def one_word(submitted) -> None:
    submitted.put(TextOutput(0, (1,), "word"))


async def send(server, path: str, body: dict):
    reader, writer = await server.connect()
    data = json.dumps(body).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


def leave(writer: asyncio.StreamWriter, how: str) -> None:
    if how == "reset":
        writer.transport.abort()
    else:
        writer.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_before_the_first_token_cancels(server, stream, how):
    server.node.script = never
    _, writer = await send(server, "/v1/chat/completions", STREAM | {"stream": stream})
    submitted = await server.node.wait_for(1)
    leave(writer, how)
    await submitted.cancelled.wait()
    assert not server.node.open


async def test_leaving_in_the_middle_of_a_stream_cancels(server):
    server.node.script = one_word
    reader, writer = await send(server, "/v1/chat/completions", STREAM)
    submitted = await server.node.wait_for(1)
    await reader.readuntil(b"word")
    writer.close()
    await submitted.cancelled.wait()


async def test_leaving_cancels_every_answer_of_the_request(server):
    server.node.script = never
    _, writer = await send(server, "/v1/completions", {"model": "chat", "prompt": ["a", "b"], "n": 2})
    await server.node.wait_for(4)
    writer.close()
    for submitted in server.node.submitted:
        await submitted.cancelled.wait()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "embed", "input": "a"}),
        ("/v1/classify", {"model": "texts", "input": "a"}),
        ("/v1/models/team/echo/infer", {"x": 1}),
    ],
)
async def test_leaving_cancels_requests_of_every_task(server, path, body):
    server.node.script = never
    _, writer = await send(server, path, body)
    submitted = await server.node.wait_for(1)
    writer.close()
    await submitted.cancelled.wait()


async def test_one_failed_answer_cancels_the_others(server):
    from computron.errors import SwapFailed

    async def first_fails(submitted) -> None:
        if submitted.handle.number == 0:
            submitted.finish(SwapFailed("the link broke"))

    server.node.script = first_fails
    status, body, _ = await server.post("/v1/completions", {"model": "chat", "prompt": ["a", "b", "c"]})
    assert (status, body["error"]["code"]) == (503, "swap_failed")
    assert [s.cancelled.is_set() for s in server.node.submitted] == [False, True, True]


async def test_a_request_that_the_node_refuses_halfway_leaves_nothing_behind(server):
    from computron.errors import QueueFull

    accept = server.node.submit

    def refuse_the_third(model, job, **options):
        if len(server.node.submitted) == 2:
            raise QueueFull("full", retry_after=2.0)
        return accept(model, job, **options)

    server.node.script = never
    server.node.submit = refuse_the_third
    status, body, headers = await server.post("/v1/completions", {"model": "chat", "prompt": ["a", "b", "c"]})
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "queue_full", "2")
    assert not server.node.open
