"""The official client, as users have it."""

from __future__ import annotations

import asyncio

import openai
import pytest

MESSAGES = [{"role": "user", "content": "What is the answer?"}]
ANSWER = "The answer is 42."


async def test_chat_completion_has_the_shape_of_openai(server):
    async with server.client as client:
        answer = await client.chat.completions.create(model="chat", messages=MESSAGES)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "chat", None)
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    prompt = len("user: What is the answer?\n")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        prompt, 4, prompt + 4,
    )  # fmt: skip


async def test_streamed_chat_gives_the_same_text_and_the_usage_when_asked(server):
    async with server.client as client:
        stream = await client.chat.completions.create(
            model="chat", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert len({c.id for c in chunks}) == 1


async def test_several_chat_answers_are_told_apart(server):
    async with server.client as client:
        answer = await client.chat.completions.create(model="chat", messages=MESSAGES, n=3, seed=5)
        stream = await client.chat.completions.create(model="chat", messages=MESSAGES, n=3, stream=True)
        texts = ["", "", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 3 == texts
    assert [s.job.sampling.seed for s in server.node.submitted[:3]] == [5, 6, 7]
    assert answer.usage.prompt_tokens == len("user: What is the answer?\n")
    assert answer.usage.completion_tokens == 12


async def test_chat_log_probabilities_have_the_shape_of_openai(server):
    async with server.client as client:
        answer = await client.chat.completions.create(model="chat", messages=MESSAGES, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["The", " answer", " is", " 42."]
    assert content[0].bytes == list(b"The")
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("The", -0.5), ("x", -2.0), ("y", -9999.0)]


async def test_completion_has_the_shape_of_openai_and_sixteen_tokens_by_default(server):
    async with server.client as client:
        answer = await client.completions.create(model="chat", prompt="Say:")
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        ANSWER,
        "stop",
    )
    assert answer.usage.prompt_tokens == 4
    assert server.node.submitted[0].job.sampling.max_tokens == 16


async def test_streamed_completion_gives_the_same_text(server):
    async with server.client as client:
        stream = await client.completions.create(model="chat", prompt="Say:", stream=True, max_tokens=2)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The answer"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "length"]


@pytest.mark.parametrize(
    ("prompt", "token_lists"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ([[97, 98], [99]], [(97, 98), (99,)]),
    ],
)
async def test_prompts_come_as_text_or_tokens_one_or_many(server, prompt, token_lists):
    async with server.client as client:
        answer = await client.completions.create(model="chat", prompt=prompt, n=2)
    assert [s.job.prompt for s in server.node.submitted] == [tokens for tokens in token_lists for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(token_lists)))
    assert answer.usage.prompt_tokens == sum(map(len, token_lists))


async def test_completion_log_probabilities_count_the_text(server):
    async with server.client as client:
        answer = await client.completions.create(model="chat", prompt="Say:", logprobs=2, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["The", " answer"]
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert logprobs.top_logprobs[0] == {"The": -0.5, "x": -2.0}
    assert logprobs.text_offset == [0, 3]


async def test_echo_without_new_tokens_scores_the_prompt_alone(server):
    async with server.client as client:
        answer = await client.completions.create(model="chat", prompt="abc", echo=True, max_tokens=0, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "abc"
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0]
    assert choice.logprobs.top_logprobs == [None, {"b": -1.0, "q": -0.1}, {"c": -1.0, "q": -0.1}]
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_the_answer(server, stream):
    async with server.client as client:
        answer = await client.completions.create(
            model="chat", prompt="abc ", echo=True, max_tokens=1, logprobs=0, stream=stream
        )
        choice = (await anext(aiter(answer)) if stream else answer).choices[0]
    assert choice.text == "abc The"
    assert choice.logprobs.tokens == ["a", "b", "c", " ", "The"]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_embeddings_come_as_floats_or_base64(server, form):
    async with server.client as client:
        answer = await client.embeddings.create(model="embed", input=["ab", "abc"], encoding_format=form)
        default = await client.embeddings.create(model="embed", input="ab")
    if form == "float":
        assert [item.embedding for item in answer.data] == [[0.5, 2.0, -1.25], [0.5, 3.0, -1.25]]
    assert default.data[0].embedding == [0.5, 2.0, -1.25]
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)


async def test_models_are_listed_with_their_state(server):
    async with server.client as client:
        models = {model.id: model async for model in client.models.list()}
        one = await client.models.retrieve("team/echo")
    assert set(models) == {"chat", "embed", "texts", "images", "team/echo"}
    extra = models["chat"].model_extra
    assert (extra["state"], extra["bytes"], extra["resident_ratio"], extra["task"]) == (
        "partial",
        1000,
        0.25,
        "generate",
    )
    assert one.id == "team/echo"


async def test_the_synchronous_client_works(server):
    def ask() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key") as client:
            whole = client.chat.completions.create(model="chat", messages=MESSAGES)
            parts = client.chat.completions.create(model="chat", messages=MESSAGES, stream=True)
            return whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in parts)

    assert await asyncio.to_thread(ask) == (ANSWER, ANSWER)


async def test_errors_reach_the_client_as_its_own_exceptions(server):
    async with server.client as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nothing", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model="chat", messages=MESSAGES, temperature=-1)
        with pytest.raises(openai.BadRequestError) as long:
            await client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "x" * 200}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert wrong.value.param == "temperature"
    assert long.value.code == "context_length_exceeded"
