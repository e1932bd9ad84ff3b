"""What takes long with a large body is done beside the event loop."""

from __future__ import annotations

import base64
import threading

import pytest

LONG = 3000
MANY = 100
IMAGE = base64.b64encode(b"image").decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"model": "chat", "prompt": "a" * LONG, "return_token_strs": True}),
        ("/detokenize", {"model": "chat", "tokens": [97] * LONG}),
        ("/v1/completions", {"model": "chat", "prompt": [97] * LONG, "echo": True}),
    ],
)
async def test_long_texts_are_encoded_and_decoded_on_a_thread(server, path, body):
    await check_threads(server, path, body, main=False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "chat", "prompt": ["hi"] * MANY}),
        ("/v1/completions", {"model": "chat", "prompt": [[97]] * MANY, "echo": True}),
        ("/v1/embeddings", {"model": "embed", "input": ["hi"] * MANY}),
        ("/v1/classify", {"model": "texts", "input": ["hi"] * MANY}),
        ("/v1/classify", {"model": "images", "image": IMAGE}),
    ],
)
async def test_many_short_texts_and_any_image_are_prepared_on_a_thread(server, path, body):
    await check_threads(server, path, body, main=False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "chat", "prompt": ["hi"] * 3}),
        ("/v1/embeddings", {"model": "embed", "input": "hi"}),
    ],
)
async def test_a_few_short_texts_are_not_worth_a_thread(server, path, body):
    await check_threads(server, path, body, main=True)


async def check_threads(server, path, body, *, main: bool) -> None:
    """Ask, and see whether the work on texts and images was done on the main thread, or none of it."""
    model = server.node.models[body["model"]]
    if model.executor.max_len:
        model.executor.max_len = 2 * LONG
    threads: set[threading.Thread] = set()

    def noted(method):
        def call(*args, **settings):
            threads.add(threading.current_thread())
            return method(*args, **settings)

        return call

    model.encode, model.decode, model.pixels = noted(model.encode), noted(model.decode), noted(model.pixels)
    status, answer, _ = await server.post(path, body)
    assert status == 200, answer
    assert threads
    assert threads == {threading.main_thread()} if main else threading.main_thread() not in threads
