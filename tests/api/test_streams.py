"""What a stream looks like on the wire."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from computron.errors import ExecutionFailed, QueueFull
from computron.execution.requests import TextOutput

BODY = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def read_events(response) -> list[str]:
    return [event for event in (await response.text()).split("\n\n") if event]


def data(event: str):
    return json.loads(event.removeprefix("data: "))


async def test_a_stream_is_server_sent_events_that_end_with_done(server):
    async with server.session.post(server.url + "/v1/chat/completions", json=BODY) as response:
        events = await read_events(response)
    assert response.status == 200
    assert response.content_type == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    assert events[-1] == "data: [DONE]"
    assert all(data(event)["object"] == "chat.completion.chunk" for event in events[:-1])
    assert "usage" not in data(events[0])


async def test_usage_can_come_with_every_chunk(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with server.session.post(
        server.url + "/v1/completions",
        json={"model": "chat", "prompt": "ab", "stream": True, "stream_options": options},
    ) as response:
        events = await read_events(response)
    assert [data(event)["usage"]["completion_tokens"] for event in events[:-1]] == [1, 2, 3, 4, 4]


async def test_a_waiting_stream_is_kept_alive_by_comments(run_server):
    async with run_server(keep_alive_interval=0.01) as server:
        go = asyncio.Event()

        async def after_a_wait(submitted) -> None:
            await go.wait()
            submitted.put(TextOutput(0, (1,), "late", finish_reason="stop"))
            submitted.finish()

        server.node.script = after_a_wait
        async with server.session.post(server.url + "/v1/chat/completions", json=BODY) as response:
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == b": waiting for model\n\n"
            go.set()
            rest = await response.text()
    assert "late" in rest
    assert rest.endswith("data: [DONE]\n\n")


async def test_a_stream_that_stands_still_is_kept_alive_too(run_server):
    async with run_server(keep_alive_interval=0.01) as server:
        go = asyncio.Event()

        async def with_a_pause(submitted) -> None:
            submitted.put(TextOutput(0, (1,), "early"))
            await go.wait()
            submitted.put(TextOutput(0, (2,), "late", finish_reason="stop"))
            submitted.finish()

        server.node.script = with_a_pause
        async with server.session.post(server.url + "/v1/chat/completions", json=BODY) as response:
            await response.content.readuntil(b"early")
            await response.content.readuntil(b"\n\n")
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == b": waiting for model\n\n"
            go.set()
            rest = await response.text()
    assert "late" in rest
    assert rest.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("interval", [0.01, 60.0])
async def test_a_model_that_ends_without_an_answer_is_an_error(run_server, interval):
    async with run_server(keep_alive_interval=interval) as server:
        commented = asyncio.Event()

        async def nothing(submitted) -> None:
            if interval < 1:
                await commented.wait()
            submitted.finish()

        server.node.script = nothing
        async with server.session.post(server.url + "/v1/chat/completions", json=BODY) as response:
            commented.set()
            assert response.status == (200 if interval < 1 else 500)
            assert "the model ended without an answer" in await response.text()


async def test_the_official_client_overlooks_comments(run_server):
    async with run_server(keep_alive_interval=0.01) as server:
        waited = asyncio.Event()

        async def after_a_comment(submitted) -> None:
            await waited.wait()
            submitted.put(TextOutput(0, (1,), "late", finish_reason="stop"))
            submitted.finish()

        server.node.script = after_a_comment
        async with server.client as client:
            stream = await client.chat.completions.create(**BODY)  # returns with the headers, so with a comment
            waited.set()
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "late"


async def test_an_error_before_anything_is_sent_has_its_status(server):
    async def full(submitted) -> None:
        submitted.finish(QueueFull("the queue is full", retry_after=1.0))

    server.node.script = full
    status, body, headers = await server.post("/v1/chat/completions", BODY)
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "queue_full", "1")


async def test_an_error_in_the_middle_is_the_last_event(server):
    async def broken(submitted) -> None:
        submitted.put(TextOutput(0, (1,), "half"))
        await asyncio.sleep(0)
        submitted.finish(ExecutionFailed("the model failed"))

    server.node.script = broken
    async with server.session.post(server.url + "/v1/chat/completions", json=BODY) as response:
        events = await read_events(response)
    assert response.status == 200
    assert data(events[-1])["error"] == {
        "message": "the model failed",
        "type": "server_error",
        "param": None,
        "code": "execution_failed",
    }
    async with server.client as client:
        with pytest.raises(openai.APIError, match="the model failed"):
            async for _ in await client.chat.completions.create(**BODY):
                pass


async def test_an_unexpected_error_in_the_middle_leaks_nothing(server, caplog):
    async def wrong_output(submitted) -> None:
        submitted.put(TextOutput(0, (1,), "half"))
        submitted.put("secret")
        submitted.finish()

    server.node.script = wrong_output
    async with server.session.post(server.url + "/v1/chat/completions", json=BODY) as response:
        events = await read_events(response)
    assert "secret" not in events[-1]
    assert "error" in data(events[-1])


async def test_tokens_that_make_no_text_yet_are_streamed_too(server):
    async def half_characters(submitted) -> None:
        submitted.put(TextOutput(0, (1,), ""))
        submitted.put(TextOutput(0, (), ""))
        submitted.put(TextOutput(0, (2,), "é", finish_reason="stop"))
        submitted.finish()

    server.node.script = half_characters
    async with server.client as client:
        chunks = [c async for c in await client.completions.create(model="chat", prompt="a", stream=True)]
    assert [chunk.choices[0].text for chunk in chunks] == ["", "é"]
