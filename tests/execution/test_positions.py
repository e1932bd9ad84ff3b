from __future__ import annotations

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from computron.errors import ContextTooLong
from computron.execution.positions import position_limit

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}


def test_positions_that_never_switch_have_no_limit() -> None:
    assert position_limit(GPT2Config()) is None
    assert position_limit(LlamaConfig()) is None
    assert position_limit(Gemma3TextConfig()) is None
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert position_limit(LlamaConfig(rope_parameters=linear)) is None


def test_positions_that_switch_are_limited_to_the_original_length() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert position_limit(LlamaConfig(max_position_embeddings=512, rope_parameters=dynamic)) == 512
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters=LONG,
    )
    assert position_limit(config) == 64


def test_a_prompt_beyond_the_limit_is_refused(rig, greedy, monkeypatch) -> None:
    monkeypatch.setattr("computron.execution.generate.position_limit", lambda config: 40)
    with pytest.raises(ContextTooLong, match="takes 40"):
        rig("llama").executor.prepare(greedy((1,) * 40))
