"""Shapes of well-known models, for `source = "random:<preset>"`: experiments need the bytes, not the knowledge."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, OPTConfig, PretrainedConfig

# layers, hidden size, heads (OPT, arXiv 2205.01068, table 1)
_OPT = {
    "opt-125m": (12, 768, 12),
    "opt-350m": (24, 1024, 16),
    "opt-1.3b": (24, 2048, 32),
    "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
    "opt-66b": (64, 9216, 72),
    "opt-175b": (96, 12288, 96),
}
# layers, hidden, MLP, heads, key-value heads, vocabulary, context, RoPE theta, tied head
_LLAMA = {
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, 8192, 100000.0, True),
    "tinyllama-1.1b": (22, 2048, 5632, 32, 4, 32000, 2048, 10000.0, False),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128256, 131072, 500000.0, True),
    "llama-2-7b": (32, 4096, 11008, 32, 32, 32000, 4096, 10000.0, False),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256, 8192, 500000.0, False),
    "llama-2-13b": (40, 5120, 13824, 40, 40, 32000, 4096, 10000.0, False),
    "llama-3-70b": (80, 8192, 28672, 64, 8, 128256, 8192, 500000.0, False),
}
PRESETS = (*_OPT, *_LLAMA)


def preset_config(name: str) -> PretrainedConfig:
    """The configuration of a preset; float16 for OPT and bfloat16 for Llama shapes, as they were published."""
    if name in _OPT:
        layers, hidden, heads = _OPT[name]
        # The 350M model alone projects a smaller embedding and normalises after each block.
        special: dict[str, Any] = (
            {"word_embed_proj_dim": 512, "do_layer_norm_before": False} if name == "opt-350m" else {}
        )
        return OPTConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            ffn_dim=4 * hidden,
            num_attention_heads=heads,
            dtype="float16",
            **special,
        )
    layers, hidden, mlp, heads, kv_heads, vocabulary, context, theta, tied = _LLAMA[name]
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
