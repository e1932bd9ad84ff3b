"""What every request passes: request ids, keys, limits, priorities, timings, log lines."""

from __future__ import annotations

import asyncio
import re

import pytest

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


async def test_the_clients_request_id_comes_back_and_names_the_answer(server):
    _, answer, headers = await server.post("/v1/chat/completions", CHAT, X_Request_Id="my-id.7")
    assert headers["X-Request-Id"] == "my-id.7"
    assert answer["id"] == "chatcmpl-my-id.7"
    assert server.node.submitted[0].handle.request_id == "my-id.7"


async def test_each_answer_of_a_request_is_known_by_its_own_id(server):
    await server.post("/v1/completions", {"model": "chat", "prompt": ["a", "b"]}, X_Request_Id="r")
    assert [s.handle.request_id for s in server.node.submitted] == ["r-0", "r-1"]


@pytest.mark.parametrize("given", ["a b", "x" * 129, "é", '"quoted"', ""])
async def test_an_insane_request_id_is_replaced(server, given):
    _, _, headers = await server.post("/v1/chat/completions", CHAT, X_Request_Id=given)
    assert re.fullmatch(r"[0-9a-f]{32}", headers["X-Request-Id"])


async def test_streams_and_errors_carry_the_request_id_too(server):
    async with server.session.post(server.url + "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        assert "X-Request-Id" in response.headers
    _, _, headers = await server.post("/v1/nothing", {}, X_Request_Id="r")
    assert headers["X-Request-Id"] == "r"


async def test_a_key_is_asked_for_where_one_is_set(run_server):
    async with run_server(api_key="secret") as server:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, answer, headers = await server.post("/v1/chat/completions", CHAT, **given)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
        status, _, _ = await server.post("/v1/chat/completions", CHAT, Authorization="Bearer secret")
        assert status == 200
        assert (await server.get("/v1/models"))[0] == 401
        for path in ("/health", "/health/ready", "/metrics", "/version"):
            assert (await server.get(path))[0] == 200


async def test_a_client_over_its_limit_is_told_to_wait(run_server):
    async def never(submitted) -> None: ...

    async with run_server(max_requests_per_client=2) as server:
        answer_fully, server.node.script = server.node.script, never
        mine = {"Authorization": "Bearer mine"}
        open_ones = [asyncio.create_task(server.post("/v1/chat/completions", CHAT, **mine)) for _ in range(2)]
        await server.node.wait_for(2)
        status, answer, headers = await server.post("/v1/chat/completions", CHAT, **mine)
        assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        server.node.script = answer_fully
        assert (await server.post("/v1/chat/completions", CHAT, Authorization="Bearer other"))[0] == 200
        open_ones[0].cancel()
        await server.node.submitted[0].cancelled.wait()
        assert (await server.post("/v1/chat/completions", CHAT, **mine))[0] == 200
        open_ones[1].cancel()
        await server.node.submitted[1].cancelled.wait()


async def test_priority_and_deadline_reach_the_node(server):
    await server.post("/v1/chat/completions", CHAT | {"priority": 3})
    await server.post("/v1/chat/completions", CHAT | {"priority": 3}, X_Computron_Priority="5")
    await server.post("/v1/chat/completions", CHAT, X_Computron_Deadline_Ms="1500")
    seen = [(s.priority, s.deadline) for s in server.node.submitted]
    assert seen == [(-3, None), (5, None), (0, 1.5)]  # the body's priority is vLLM's: lower goes first


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        ({}, {"X_Computron_Priority": "11"}, "X-Computron-Priority must be at most 10 (server.max_priority), not 11"),
        ({"priority": -11}, {}, "`priority` must be at least -10 (server.max_priority), not -11"),
    ],
)
async def test_a_priority_is_bounded(server, body, headers, message):
    status, answer, _ = await server.post("/v1/chat/completions", CHAT | body, **headers)
    assert (status, answer["error"]["message"]) == (400, message)
    allowed = {"X_Computron_Priority": "10"}
    assert (await server.post("/v1/chat/completions", CHAT | body, **allowed))[0] == 200


async def test_the_bound_of_priorities_is_configured(run_server):
    async with run_server(max_priority=0) as server:
        assert (await server.post("/v1/chat/completions", CHAT, X_Computron_Priority="1"))[0] == 400
        assert (await server.post("/v1/chat/completions", CHAT, X_Computron_Priority="-5"))[0] == 200


@pytest.mark.parametrize("headers", [{"X_Computron_Priority": "high"}, {"X_Computron_Deadline_Ms": "0"}])
async def test_a_wrong_header_is_named(server, headers):
    status, answer, _ = await server.post("/v1/chat/completions", CHAT, **headers)
    assert status == 400
    assert answer["error"]["param"] == next(iter(headers)).replace("_", "-")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "chat", "prompt": ["a", "b"]}),
        ("/v1/embeddings", {"model": "embed", "input": "a"}),
        ("/v1/classify", {"model": "texts", "input": "a"}),
        ("/v1/models/team/echo/infer", {}),
    ],
)
async def test_timings_come_with_the_answer_when_asked_for(server, path, body):
    _, silent, _ = await server.post(path, body)
    assert "computron" not in silent
    _, answer, _ = await server.post(path, body, X_Computron_Timings="1")
    assert answer["computron"] == {
        "queue_seconds": None,
        "swap_seconds": 0.0,
        "swap_bytes": 0,
        "first_output_seconds": None,
        "total_seconds": 1.0,
    }


async def test_each_request_has_one_log_line_that_names_it(server, caplog):
    caplog.set_level("INFO", logger="computron")
    await server.post("/v1/chat/completions", CHAT)
    await server.post("/v1/chat/completions", CHAT | {"model": "nothing"})
    await server.get("/health")
    lines = [re.sub(r"seconds=\S+", "seconds=_", m) for m in caplog.messages if m.startswith("request ")]
    assert lines == [
        "request method=POST path=/v1/chat/completions status=200 seconds=_ model=chat error=-",
        "request method=POST path=/v1/chat/completions status=404 seconds=_ model=- error=model_not_found",
    ]


async def test_a_client_that_left_is_logged_as_such(server, caplog):
    async def never(submitted) -> None: ...

    caplog.set_level("INFO", logger="computron")
    server.node.script = never
    task = asyncio.create_task(server.post("/v1/chat/completions", CHAT))
    submitted = await server.node.wait_for(1)
    task.cancel()
    await submitted.cancelled.wait()
    await server.get("/health")
    assert any("status=499" in message for message in caplog.messages)


async def test_a_client_that_expects_to_be_told_to_continue_is_told(server):
    data = b'{"model": "chat", "prompt": "a"}'
    reader, writer = await server.connect()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(data)
    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.close()


@pytest.mark.parametrize("path", ["/v1/models/team/echo", "/v1/models/team%2Fecho"])
async def test_model_ids_with_slashes_may_be_escaped(server, path):
    status, answer = await server.get(path)
    assert (status, answer["id"]) == (200, "team/echo")


async def test_a_connection_serves_one_request_after_the_other(server):
    data = b'{"model": "chat", "prompt": "a"}'
    request = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    reader, writer = await server.connect()
    for _ in range(3):
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200")
        await reader.readexactly(int(re.search(r"Content-Length: (\d+)", head)[1]))
    writer.close()
