"""A quantized Llama-like GGUF file as a checkpoint folder of transformers, in bfloat16. Needs the package `gguf`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from computron.errors import CheckpointError

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_llama(file: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write config, bfloat16 safetensors and tokenizer to `folder`. `progress`: bytes written of bytes in all.

    Raises CheckpointError if the file is not of a Llama-like model.
    """
    reader = GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(f"{file}: its architecture is {fields.get('general.architecture')}, not llama")
    config = _config(fields, tied=not any(tensor.name == "output.weight" for tensor in reader.tensors))
    total = sum(int(np.prod(tensor.shape)) * 2 for tensor in reader.tensors)
    done = 0
    state = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        name = _name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = fields["llama.attention.head_count" if "q_proj" in name else "llama.attention.head_count_kv"]
            values = _rotary_halves(values, heads)
        state[name] = values.to(torch.bfloat16).contiguous()
        done += state[name].nbytes
        progress(done, total)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)


def _config(fields: dict[str, Any], *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=fields["llama.block_count"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        vocab_size=fields["llama.vocab_size"],
        max_position_embeddings=fields["llama.context_length"],
        # The file keeps float32; the model was trained with the decimal number.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, kind, suffix = name.split(".")
        return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"
    kind, suffix = name.split(".")
    return f"{_NAMES[kind]}.{suffix}"


def _rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF keeps the pairs that rotate together next to each other, transformers the halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
