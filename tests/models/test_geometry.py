from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BltConfig,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    T5Config,
)

from computron.errors import CheckpointError
from computron.models import CacheGeometry, plan_model
from computron.models.byte_tokenizer import byte_tokenizer

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def random_source(tmp_path, config):
    config.save_pretrained(tmp_path)
    return f"random:{tmp_path}"


@pytest.mark.parametrize(
    ("architecture", "heads", "dim"), [("llama", 2, 8), ("gpt2", 4, 8), ("opt", 4, 8), ("qwen3", 2, 16), ("phi3", 2, 8)]
)
def test_geometry_is_what_attention_is_given(architecture, heads, dim, checkpoint, config):
    plan = plan_model(config(checkpoint("generate", architecture, torch.bfloat16)))
    assert plan.cache == CacheGeometry(3, heads, dim, dim, torch.bfloat16)
    assert plan.cache.bytes_per_token == 3 * heads * 2 * dim * 2


def test_only_generate_has_a_cache(checkpoint, config):
    assert plan_model(config(checkpoint("embed", "llama"), task="embed")).cache is None


def test_a_recurrent_state_is_refused(tmp_path, config):
    source = random_source(tmp_path, MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(CheckpointError, match="MambaForCausalLM cannot be served for generate: it keeps a recurrent"):
        plan_model(config(source))


def test_attention_outside_transformers_interface_is_refused(tmp_path, config):
    source = random_source(tmp_path, BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(CheckpointError, match=r"0 of its 2 layers use transformers' attention interface"):
        plan_model(config(source))


def test_a_model_of_several_parts_is_refused(tmp_path, config):
    with pytest.raises(CheckpointError, match="BltForCausalLM cannot be served for generate: its config does not say"):
        plan_model(config(random_source(tmp_path, BltConfig())))


@pytest.mark.parametrize("task", ["generate", "embed"])
def test_an_encoder_decoder_is_refused(task, tmp_path, config):
    source = random_source(tmp_path, T5Config(vocab_size=300, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48))
    with pytest.raises(CheckpointError, match=r"cannot build a t5 model for generate|encoder-decoder"):
        plan_model(config(source, task=task))


def test_a_model_of_another_task_is_refused(checkpoint, config):
    with pytest.raises(CheckpointError, match="cannot build a vit model for generate"):
        plan_model(config(checkpoint("classify", "vit"), task="generate"))


def test_image_sizes_follow_from_the_config_alone(tmp_path, config, filled):
    for name, made in {
        "a": LlamaConfig(**SMALL, intermediate_size=48),
        "b": Qwen2Config(**SMALL, intermediate_size=48, tie_word_embeddings=True),
        "c": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    }.items():
        plan = plan_model(config(random_source(tmp_path / name, made)))
        byte_tokenizer(300).save_pretrained(tmp_path / name)
        assert len(filled(plan)) == plan.image.nbytes


GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@pytest.mark.parametrize(
    "made",
    [
        PhimoeConfig(**GROUPED, **EXPERTS, sliding_window=8),
        DogeConfig(**GROUPED, sliding_window=8),
        Qwen2MoeConfig(**GROUPED, **MOE, use_sliding_window=True, sliding_window=8, max_window_layers=2),
        Llama4TextConfig(**GROUPED, **EXPERTS, intermediate_size_mlp=48, head_dim=8, attention_chunk_size=8),
    ],
    ids=lambda made: made.model_type,
)
def test_a_window_that_only_the_mask_knows_bounds_the_context(made, tmp_path, config):
    source = random_source(tmp_path, made)
    byte_tokenizer(300).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"chunks of 8 tokens .* set max_model_len to 8 or less"):
        plan_model(config(source))
    assert plan_model(config(source, max_model_len=8)).max_model_len == 8


@pytest.mark.parametrize(
    "made",
    [
        MistralConfig(**GROUPED, sliding_window=8),
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        Qwen2Config(**GROUPED, use_sliding_window=False, sliding_window=8),
        Qwen2MoeConfig(**GROUPED, **MOE, use_sliding_window=False, sliding_window=8),
        Gemma2Config(**GROUPED, head_dim=8, sliding_window=8),
        Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8),
        PhimoeConfig(**GROUPED, **EXPERTS, sliding_window=64),
    ],
    ids=lambda made: f"{made.model_type}-{made.sliding_window}",
)
def test_a_window_that_attention_is_given_bounds_nothing(made, tmp_path, config):
    source = random_source(tmp_path, made)
    byte_tokenizer(300).save_pretrained(tmp_path)
    assert plan_model(config(source)).max_model_len == 64
