"""What clients may ask of generation reaches the node, with the model's own defaults where they ask nothing."""

from __future__ import annotations

import pytest

from computron.execution.requests import SamplingParams
from computron.models.text import GenerationDefaults

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = len("user: hi\n")


async def sampling(server, body: dict, path: str = "/v1/chat/completions") -> SamplingParams:
    status, answer, _ = await server.post(path, body)
    assert status == 200, answer
    return server.node.submitted[-1].job.sampling


async def test_every_field_reaches_the_node(server):
    asked = {
        "max_completion_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "seed": -3, "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": True, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.2,
        "logit_bias": {"3": 200, "4": -1.5}, "logprobs": True, "top_logprobs": 4, "prompt_logprobs": 2,
        "user": "me", "response_format": {"type": "text"},
    }  # fmt: skip
    assert await sampling(server, CHAT | asked) == SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-3, stop=("a", "b"),
        stop_token_ids=(5,), ignore_eos=True, include_stop=True, skip_special_tokens=False, presence_penalty=1.0,
        frequency_penalty=-1.0, repetition_penalty=1.2, logit_bias={3: 100.0, 4: -1.5}, logprobs=4, prompt_logprobs=2,
    )  # fmt: skip


async def test_a_chat_may_use_the_rest_of_the_context(server):
    assert await sampling(server, CHAT) == SamplingParams(max_tokens=100 - PROMPT)


async def test_null_is_the_same_as_absent(server):
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "stream", "logprobs", "max_tokens", "tools"))
    assert await sampling(server, CHAT | nulls) == SamplingParams(max_tokens=100 - PROMPT)


async def test_the_models_own_defaults_hold_where_the_client_is_silent(server):
    server.node.models["chat"].plan.generation = GenerationDefaults(
        temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=30
    )
    silent = await sampling(server, CHAT)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.min_p) == (0.7, 0.8, 20, 0.05)
    assert (silent.repetition_penalty, silent.max_tokens) == (1.1, 30)
    spoken = await sampling(server, CHAT | {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "max_tokens": 5})
    assert (spoken.temperature, spoken.top_p, spoken.top_k, spoken.min_p, spoken.max_tokens) == (0, 1, 0, 0, 5)


async def test_a_completion_has_sixteen_tokens_or_what_room_is_left(server):
    assert (await sampling(server, {"model": "chat", "prompt": "a"}, "/v1/completions")).max_tokens == 16
    assert (await sampling(server, {"model": "chat", "prompt": "a" * 95}, "/v1/completions")).max_tokens == 5
    body = {"model": "chat", "prompt": "a", "max_tokens": None}
    assert (await sampling(server, body, "/v1/completions")).max_tokens == 99


async def test_each_prompt_of_a_call_has_the_room_that_it_leaves(server):
    body = {"model": "chat", "prompt": ["a" * 95, "b", "c" * 95, "d" * 98], "max_tokens": None}
    await server.post("/v1/completions", body)
    lengths = {chr(s.job.prompt[0]): s.job.sampling.max_tokens for s in server.node.submitted}
    assert lengths == {"a": 5, "b": 99, "c": 5, "d": 2}


async def test_content_parts_and_tool_messages_reach_the_template(server):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "c", "tool_call_id": "1", "name": "f"},
    ]
    await sampling(server, CHAT | {"messages": messages})
    text = "".join(map(chr, server.node.submitted[-1].job.prompt))
    assert text == "system: a\nb\nassistant: \ntool: c\n"


async def test_template_arguments_reach_the_template(server):
    model = server.node.models["chat"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    await sampling(server, CHAT | {"tools": tools, "tool_choice": "none", "chat_template_kwargs": {"thinking": False}})
    assert model.template_arguments == {
        "thinking": False, "tools": tools, "continue_final_message": False, "add_generation_prompt": True,
    }  # fmt: skip
    await sampling(server, CHAT | {"continue_final_message": True})
    assert model.template_arguments == {"continue_final_message": True, "add_generation_prompt": False}
    await sampling(server, CHAT | {"add_generation_prompt": False})
    assert model.template_arguments == {"continue_final_message": False, "add_generation_prompt": False}


@pytest.mark.parametrize(("keep", "expected"), [(3, "cde"), (-1, "abcde")])
async def test_prompts_can_be_cut_to_their_end(server, keep, expected):
    body = {"model": "chat", "prompt": "abcde", "truncate_prompt_tokens": keep, "echo": True, "max_tokens": 1}
    _, answer, _ = await server.post("/v1/completions", body)
    assert answer["choices"][0]["text"] == f"{expected}The"


async def test_prompt_log_probabilities_have_the_format_of_vllm(server):
    _, answer, _ = await server.post("/v1/completions", {"model": "chat", "prompt": "ab", "prompt_logprobs": 1})
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -0.1, "rank": 1, "decoded_token": "q"},
            "98": {"logprob": -1.0, "rank": None, "decoded_token": "b"},
        },
    ]
    _, chat, _ = await server.post("/v1/chat/completions", CHAT | {"prompt_logprobs": 0})
    assert len(chat["prompt_logprobs"]) == PROMPT


async def test_tokens_can_be_named_by_their_ids(server):
    body = {"model": "chat", "prompt": "ab", "logprobs": 1, "max_tokens": 1, "return_tokens_as_token_ids": True}
    _, answer, _ = await server.post("/v1/completions", body)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:0"]


async def test_the_ids_of_an_answer_are_told_if_asked_for(server):
    body = {"model": "chat", "prompt": "ab", "max_tokens": 3}
    _, plain, _ = await server.post("/v1/completions", body)
    assert "token_ids" not in plain["choices"][0]
    _, answer, _ = await server.post("/v1/completions", body | {"return_token_ids": True})
    assert answer["choices"][0]["token_ids"] == [0, 1, 2]


async def test_the_stop_that_ended_an_answer_is_told(server):
    from computron.execution.requests import TextOutput

    async def stopped(submitted) -> None:
        submitted.put(TextOutput(0, (1,), "x", finish_reason="stop", stop_reason="END"))
        submitted.finish()

    server.node.script = stopped
    _, answer, _ = await server.post("/v1/chat/completions", CHAT)
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", "END")


async def test_a_long_text_is_tokenised_off_the_event_loop(server):
    import threading

    threads = []

    def encode(text, *, add_special_tokens=True):
        threads.append(threading.current_thread())
        return [1]

    server.node.models["chat"].encode = encode
    await sampling(server, {"model": "chat", "prompt": "short"}, "/v1/completions")
    await sampling(server, {"model": "chat", "prompt": "long" * 1000}, "/v1/completions")
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


async def test_the_context_is_what_the_device_can_serve(server):
    server.node.models["chat"].executor.max_len = 40
    assert await sampling(server, CHAT) == SamplingParams(max_tokens=40 - PROMPT)
    status, answer, _ = await server.post("/v1/chat/completions", CHAT | {"max_tokens": 41 - PROMPT})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 40 tokens" in answer["error"]["message"]
    status, answer, _ = await server.post("/v1/completions", {"model": "chat", "prompt": "a" * 40})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert (await server.get("/v1/models/chat"))[1]["max_model_len"] == 40
    assert (await server.post("/tokenize", {"model": "chat", "prompt": "a"}))[1]["max_model_len"] == 40
