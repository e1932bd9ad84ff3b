"""Everything a client can get wrong has a status, a clear message, and the field's name."""

from __future__ import annotations

import json

import pytest

from computron.errors import ContextTooLong

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "chat", "messages": MESSAGES}
COMPLETION = {"model": "chat", "prompt": "hi"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": ', "the body is not valid JSON: Input data was truncated"),
        (b"{nope}", "the body is not valid JSON: JSON is malformed: object keys must be strings (byte 1)"),
        (b"", "the body is empty, but JSON is needed"),
        (b"\xff\xfe", "the body is not valid JSON: JSON is malformed: invalid character (byte 0)"),
        (b'{"model": "\xff"}', "the body is not valid JSON"),
        (b"[" * 5000, "the body is"),
        (b"[1, 2]", "the body is wrong: Expected `object`, got `array`"),
    ],
)
async def test_broken_json_is_told_from_a_wrong_body(server, body, message):
    status, answer, _ = await server.post("/v1/chat/completions", body)
    assert status == 400
    assert answer["error"]["message"].startswith(message)
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", None)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "`model`: expected `str`, got `null`"),
        ({"model": "embed"}, "model", "the model `embed` has the task embed; use /v1/embeddings"),
        ({"messages": "hi"}, "messages", "`messages`: expected `array`, got `str`"),
        ({"messages": []}, "messages", "`messages` must not be empty"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "`messages[0].role` is required"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            '`messages[0].content[0]`: parts of type "image_url" are not taken; this model reads text',
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", None),
        ({"temperature": -0.1}, "temperature", "`temperature` must be from 0 to 2, not -0.1"),
        ({"temperature": 2.1}, "temperature", "`temperature` must be from 0 to 2, not 2.1"),
        ({"temperature": "hot"}, "temperature", "`temperature`: expected `float | null`, got `str`"),
        ({"top_p": 0}, "top_p", "`top_p` must be more than 0 and at most 1, not 0.0"),
        ({"top_k": -2}, "top_k", None),
        ({"min_p": 2}, "min_p", "`min_p` must be from 0 to 1, not 2.0"),
        ({"n": 0}, "n", "`n` must be from 1 to 128, not 0"),
        ({"max_tokens": 0}, "max_tokens", "`max_tokens` must be at least 1, not 0"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", None),
        ({"max_tokens": 1.5}, "max_tokens", "`max_tokens`: expected `int | null`, got `float`"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "`min_tokens` must be from 0 to 2, not 3"),
        ({"top_p": 1.1}, "top_p", None),
        ({"n": 129}, "n", None),
        ({"presence_penalty": 3}, "presence_penalty", None),
        ({"frequency_penalty": -3}, "frequency_penalty", None),
        ({"repetition_penalty": 0}, "repetition_penalty", None),
        ({"seed": 1 << 64}, "seed", None),
        ({"stop": [""]}, "stop", "`stop` must not contain an empty string"),
        ({"stop": [1]}, "stop[0]", None),
        ({"stop": ["a"] * 65}, "stop", "`stop` has 65 strings; at most 64 are taken"),
        ({"logit_bias": {"a": 1}}, "logit_bias", '`logit_bias`: "a" is not a token id'),
        ({"logit_bias": {"1": "a"}}, "logit_bias", None),
        ({"top_logprobs": 2}, "top_logprobs", "`top_logprobs` can only be given with `logprobs`: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "`top_logprobs` must be from 0 to 20, not 21"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", None),
        ({"response_format": {"type": "json_object"}}, "response_format", None),
        ({"tools": [{"type": "function"}]}, "tools", None),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tool_choice", None),
        ({"chat_template": "{{ x }}"}, "chat_template", None),
        ({"use_beam_search": True}, "use_beam_search", "`use_beam_search`: beam search is not offered"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", None),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", None),
        ({"truncate_prompt_tokens": 1000}, "truncate_prompt_tokens", None),
    ],
)
async def test_a_wrong_chat_field_is_named(server, change, param, message):
    status, answer, _ = await server.post("/v1/chat/completions", CHAT | change)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["type"] == "invalid_request_error"
    assert message is None or answer["error"]["message"] == message
    assert not server.node.submitted


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [[1], [2, 3.5]]}, "prompt[1][1]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"temperature": 2.5}, "temperature"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_a_wrong_completion_field_is_named(server, change, param):
    status, answer, _ = await server.post("/v1/completions", COMPLETION | change)
    assert (status, answer["error"]["param"]) == (400, param)
    assert not server.node.submitted


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"model": "embed"}, "input"),
        ("/v1/embeddings", {"model": "embed", "input": ""}, "input"),
        ("/v1/embeddings", {"model": "embed", "input": "a", "dimensions": 8}, "dimensions"),
        ("/v1/embeddings", {"model": "embed", "input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"model": "chat", "input": "a"}, "model"),
        ("/v1/classify", {"model": "texts", "image": "aW1hZ2U="}, "input"),
        ("/v1/classify", {"model": "images", "input": "a"}, "image"),
        ("/v1/classify", {"model": "images", "image": "not base64!"}, "image"),
        ("/v1/classify", {"model": "images", "image": "AAAA"}, "image"),
        ("/v1/classify", {"model": "images", "image": ["aW1hZ2U=", "AAAA"]}, "image[1]"),
        ("/v1/classify", {"model": "images", "image": []}, "image"),
        ("/v1/classify", {"model": "images", "image": "http://somewhere/cat.png"}, "image"),
        ("/v1/classify", {"model": "texts", "input": "a", "top_k": 0}, "top_k"),
        ("/v1/models/chat/infer", {}, "model"),
        ("/tokenize", {"model": "chat"}, "prompt"),
        ("/tokenize", {"model": "images", "prompt": "a"}, "model"),
        ("/detokenize", {"model": "chat", "tokens": [1 << 40]}, "tokens"),
    ],
)
async def test_a_wrong_field_of_the_other_routes_is_named(server, path, body, param):
    status, answer, _ = await server.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"model": "nothing"}),
        ("/v1/completions", COMPLETION | {"model": "nothing"}),
        ("/v1/embeddings", {"model": "nothing", "input": "a"}),
        ("/v1/classify", {"model": "nothing", "input": "a"}),
        ("/v1/models/nothing/infer", {}),
        ("/v1/models/nothing/load", {}),
        ("/tokenize", {"model": "nothing", "prompt": "a"}),
    ],
)
async def test_an_unknown_model_is_not_found(server, path, body):
    status, answer, _ = await server.post(path, body)
    assert status == 404
    assert answer["error"] == {
        "message": "The model `nothing` does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


async def test_an_oversized_prompt_names_both_lengths(server):
    status, answer, _ = await server.post("/v1/completions", COMPLETION | {"prompt": "x" * 100})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 100 tokens" in answer["error"]["message"]
    assert "has 100 input tokens" in answer["error"]["message"]


async def test_a_prompt_whose_answer_does_not_fit_is_refused(server):
    status, answer, _ = await server.post("/v1/completions", COMPLETION | {"prompt": "x" * 90, "max_tokens": 11})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "(11 > 100 - 90)" in answer["error"]["message"]


async def test_an_oversized_embedding_input_is_refused(server):
    status, answer, _ = await server.post("/v1/embeddings", {"model": "embed", "input": "x" * 101})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_refused(run_server, chunked):
    async def pieces():
        for _ in range(64):
            yield b"x" * 1024

    async with run_server(max_body=4096) as server:
        data = pieces() if chunked else json.dumps(CHAT | {"user": "x" * 5000}).encode()
        async with server.session.post(server.url + "/v1/chat/completions", data=data) as response:
            answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (413, "request_too_large")
    assert "4096 bytes" in answer["error"]["message"]


async def test_unknown_fields_are_ignored_and_logged_at_debug(server, caplog):
    caplog.set_level("DEBUG", logger="computron.api.bodies")
    status, _, _ = await server.post("/v1/chat/completions", CHAT | {"frobnicate": 1, "zap": 2})
    assert status == 200
    assert "ignored_fields fields=frobnicate,zap" in caplog.messages


async def test_an_unknown_route_has_the_same_shape_of_error(server):
    status, answer, _ = await server.post("/v1/nothing", {})
    assert (status, answer["error"]["code"]) == (404, "route_not_found")


async def test_a_wrong_method_tells_the_right_one(server):
    status, answer = await server.get("/v1/chat/completions")
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert answer["error"]["message"].endswith("it takes POST")


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
async def test_what_is_no_http_is_refused(server, data):
    reader, writer = await server.connect()
    writer.write(data)
    assert b" 400 " in await reader.readline()
    writer.close()


async def test_a_server_error_leaks_nothing_but_the_request_id(server, caplog):
    def broken(*args, **options):
        raise RuntimeError("secret detail")

    server.node.submit = broken
    status, answer, headers = await server.post("/v1/chat/completions", CHAT)
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer["error"]["message"]
    assert headers["X-Request-Id"] in answer["error"]["message"]
    assert any(record.exc_info and "secret detail" in str(record.exc_info[1]) for record in caplog.records)


async def test_what_the_node_finds_too_long_later_is_the_clients_fault_and_counted_by_the_node(server):
    async def reject(submitted) -> None:
        submitted.finish(ContextTooLong("the cache of this request never fits the device"))

    server.node.script = reject
    status, answer, headers = await server.post("/v1/chat/completions", CHAT)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "Retry-After" not in headers
    assert 'outcome="invalid"' not in (await server.get("/metrics"))[1]
