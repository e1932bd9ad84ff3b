"""A whole server in this process: real sockets, a real node, real transfers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig, ViTConfig

from computron.api.app import make_app
from computron.api.server import listen, url
from computron.config import Config, ModelConfig
from computron.metrics import Metrics
from computron.node.node import Node

MIB = 1 << 20


@dataclass(frozen=True)
class Server:
    url: str
    node: Node


Serving = Callable[[Config], AbstractAsyncContextManager[Server]]


@pytest.fixture
def serving() -> Serving:
    """Serves a configuration; at the end the node's memory and scheduler must agree, and nothing be left."""

    @asynccontextmanager
    async def serve(config: Config) -> AsyncIterator[Server]:
        metrics = Metrics()
        node = Node(config, metrics)
        runner = await listen(make_app(node, config.server, metrics), "127.0.0.1", 0)
        try:
            await node.startup()
            yield Server(url(runner), node)
        finally:
            await node.shutdown(drain=10.0)
            await runner.cleanup()

    return serve


_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SMALL, vocab_size=512, intermediate_size=256, num_key_value_heads=2),
    "opt": lambda: OPTConfig(**_SMALL, vocab_size=512, ffn_dim=256),
    "gpt2": lambda: GPT2Config(**_SMALL, vocab_size=512, bos_token_id=None, eos_token_id=None),
    "bert": lambda: BertConfig(**_SMALL, vocab_size=512, intermediate_size=256),
    "vit": lambda: ViTConfig(**{**_SMALL, "max_position_embeddings": None}, image_size=32, patch_size=8, num_labels=5),
}


@pytest.fixture
def random_model(tmp_path: Path) -> Callable[..., ModelConfig]:
    """A model of about 2 MB with random weights that depend on its seed."""

    def make(model: str, shape: str, **settings: Any) -> ModelConfig:
        folder = tmp_path / shape
        if not folder.exists():
            SHAPES[shape]().save_pretrained(folder)
        return ModelConfig(**{"id": model, "source": f"random:{folder}", "dtype": "float32", **settings})

    return make
