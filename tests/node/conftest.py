"""A real node over models of a few kilobytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from computron.config import Config, DeviceConfig, HostConfig, ModelConfig
from computron.node.node import Node

PAGE = 16 << 10
MODEL_PAGES = 30  # about what one model takes

Starting = Callable[..., AbstractAsyncContextManager[Node]]


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., ModelConfig]:
    """A tiny Llama with random weights that depend on its seed."""
    folder = tmp_path / "llama"
    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    ).save_pretrained(folder)

    def make(model: str, **settings: Any) -> ModelConfig:
        return ModelConfig(**{"id": model, "source": f"random:{folder}", "dtype": "float32", **settings})

    return make


@pytest.fixture
def starting() -> Starting:
    """Starts a node with these models and device pages, and shuts it down at the end."""

    @asynccontextmanager
    async def start(*models: ModelConfig, pages: int = 2 * MODEL_PAGES, **device: Any) -> AsyncIterator[Node]:
        settings = {"kind": "host", "memory": pages * PAGE, "page_size": PAGE, "chunk_size": PAGE, **device}
        node = Node(Config(device=DeviceConfig(**settings), host=HostConfig(memory=64 << 20), models=models))
        try:
            await node.startup()
            yield node
        finally:
            await node.shutdown(drain=5.0)

    return start
