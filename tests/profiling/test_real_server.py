"""A real node tells all that a profile needs, and takes the steps that a call's shape says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig

from computron.api.app import make_app
from computron.api.server import listen, url
from computron.config import Config, DeviceConfig, HostConfig, ModelConfig, ServerConfig
from computron.metrics import Metrics
from computron.node.node import Node
from computron.profiling import shapes
from computron.profiling.link import LOADS
from computron.profiling.measuring import measure
from computron.profiling.server import Server
from computron.profiling.shapes import Shape

PAGE = 16 << 10
FRAMES = 200
FAST, SLOW = 100_000_000, 5_000_000  # bandwidths: a model comes at once; it comes in pieces


@pytest.fixture
def models(tmp_path: Path) -> tuple[ModelConfig, ...]:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(**size, vocab_size=300, max_position_embeddings=256).save_pretrained(tmp_path / "chat")
    BertConfig(**size, vocab_size=300, max_position_embeddings=256).save_pretrained(tmp_path / "embed")
    settings = {"dtype": "float32", "max_batch_size": 2}
    return (
        ModelConfig(id="chat", source=f"random:{tmp_path / 'chat'}", task="generate", **settings),
        ModelConfig(id="embed", source=f"random:{tmp_path / 'embed'}", task="embed", **settings),
    )


@pytest.mark.parametrize("bandwidth", [FAST, SLOW])
async def test_profile_of_a_real_server(
    bandwidth: int, models: tuple[ModelConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "PROMPTS", (8, 32))
    monkeypatch.setattr(shapes, "OUTPUTS", (1, 4))
    device = DeviceConfig(kind="host", memory=FRAMES * PAGE, page_size=PAGE, chunk_size=PAGE, link_bandwidth=bandwidth)
    metrics = Metrics()
    node = Node(Config(device=device, host=HostConfig(memory=64 << 20), models=models), metrics)
    app = make_app(node, ServerConfig(port=0), metrics)
    runner = await listen(app, "127.0.0.1", 0)
    try:
        await node.startup()
        async with Server(url(runner)) as server:
            measured = await measure(server, seconds=0.0, pause=0.0)
    finally:
        await node.shutdown(drain=1.0)
        await runner.cleanup()
        app.close()
    hardware, (chat, embed) = measured.profile.hardware, measured.profile.models
    assert (hardware.frames, hardware.frame_bytes, hardware.stages) == (FRAMES, PAGE, 1)
    assert 0.0 < hardware.link.bandwidth < math.inf
    assert all((load.swaps > 1) == (bandwidth == SLOW) for load in measured.link.loads)
    assert [load.nbytes for load in measured.link.loads] == [chat.bytes, embed.bytes]
    swap_ins = {
        m: metrics.registry.get_sample_value("computron_swap_ins_total", {"model": m}) for m in ("chat", "embed")
    }
    assert swap_ins == dict.fromkeys(swap_ins, LOADS + 1), "one for the steps"
    assert (chat.continuous, embed.continuous) == (True, False)
    assert (chat.overlaps, embed.overlaps) == (False, True)
    assert chat.cache_bytes_per_token == 2 * 2 * 64 * 4  # keys and values of two layers
    assert 1 < chat.segments < 8
    assert {call.name for call in measured.steps["chat"].calls} == {
        Shape(batch, prompt, output).name for batch in (1, 2, 3) for prompt in (8, 32) for output in (1, 4)
        if batch < 3 or output == 1
    }  # fmt: skip
    assert all(call.work.steps == 1 + (not call.name.startswith("1 ")) for call in measured.steps["embed"].calls)
