"""What takes long with a large body is done beside the event loop."""

from __future__ import annotations

import threading

import pytest

LONG = 3000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"model": "chat", "prompt": "a" * LONG, "return_token_strs": True}),
        ("/detokenize", {"model": "chat", "tokens": [97] * LONG}),
        ("/v1/completions", {"model": "chat", "prompt": [97] * LONG, "echo": True}),
    ],
)
async def test_long_texts_are_encoded_and_decoded_on_a_thread(server, path, body):
    model = server.node.models["chat"]
    model.executor.max_len = 2 * LONG
    threads: list[threading.Thread] = []

    def noted(method):
        def call(*args, **settings):
            threads.append(threading.current_thread())
            return method(*args, **settings)

        return call

    model.encode, model.decode = noted(model.encode), noted(model.decode)
    status, _, _ = await server.post(path, body)
    assert status == 200
    assert threads
    assert threading.main_thread() not in threads
