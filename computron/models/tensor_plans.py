"""Which tensors of an architecture are split, and how: transformers' plans, and ours where it has none.

Only the names of transformers' styles are used; slices and collectives are our own (`tensor_parallel`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from computron.errors import CheckpointError

COLWISE = "colwise"  # the output is split
GATHERED = "colwise_gather_output"  # the output is split, then joined again
PACKED_COLWISE = "packed_colwise"  # the output is several blocks, and each is split
ROWWISE = "rowwise"  # the input is split, the outputs are summed
PACKED_ROWWISE = "packed_rowwise"
SPLITTING_ROWWISE = "rowwise_split_input"  # the input is whole: each node takes its part of it
VOCABULARY = "embedding_rowwise"  # an embedding whose rows are split
HEAD_COLUMNS = "embedding_by_head"  # ours: an embedding with a column for each attention head
_NAMES = {
    COLWISE: COLWISE,
    GATHERED: GATHERED,
    "colwise_rep": GATHERED,
    PACKED_COLWISE: PACKED_COLWISE,
    ROWWISE: ROWWISE,
    "rowwise_rep": ROWWISE,
    PACKED_ROWWISE: PACKED_ROWWISE,
    SPLITTING_ROWWISE: SPLITTING_ROWWISE,
    VOCABULARY: VOCABULARY,
    HEAD_COLUMNS: HEAD_COLUMNS,
}
_REPLICATED = ("replicate", "replicated_with_grad_allreduce")

_BERT = {
    "layer.*.attention.self.query": COLWISE,
    "layer.*.attention.self.key": COLWISE,
    "layer.*.attention.self.value": COLWISE,
    "layer.*.attention.output.dense": ROWWISE,
    "layer.*.intermediate.dense": COLWISE,
    "layer.*.output.dense": ROWWISE,
}
_VIT = {
    "layers.*.attention.q_proj": COLWISE,
    "layers.*.attention.k_proj": COLWISE,
    "layers.*.attention.v_proj": COLWISE,
    "layers.*.attention.o_proj": ROWWISE,
    "layers.*.mlp.fc1": COLWISE,
    "layers.*.mlp.fc2": ROWWISE,
}
# By model type; a key is the end of a module's path.
_OWN: Mapping[str, Mapping[str, str]] = {
    "opt": {
        "layers.*.self_attn.q_proj": COLWISE,
        "layers.*.self_attn.k_proj": COLWISE,
        "layers.*.self_attn.v_proj": COLWISE,
        "layers.*.self_attn.out_proj": ROWWISE,
        "layers.*.fc1": COLWISE,
        "layers.*.fc2": ROWWISE,
    },
    "gpt2": {
        "h.*.attn.c_attn": PACKED_COLWISE,
        "h.*.attn.c_proj": ROWWISE,
        "h.*.mlp.c_fc": COLWISE,
        "h.*.mlp.c_proj": ROWWISE,
    },
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "ernie": _BERT,
    "data2vec-text": _BERT,
    "megatron-bert": _BERT,
    "modernbert": {
        "layers.*.attn.Wqkv": PACKED_COLWISE,
        "layers.*.attn.Wo": ROWWISE,
        "layers.*.mlp.Wi": PACKED_COLWISE,
        "layers.*.mlp.Wo": ROWWISE,
    },
    "distilbert": {
        "layer.*.attention.q_lin": COLWISE,
        "layer.*.attention.k_lin": COLWISE,
        "layer.*.attention.v_lin": COLWISE,
        "layer.*.attention.out_lin": ROWWISE,
        "layer.*.ffn.lin1": COLWISE,
        "layer.*.ffn.lin2": ROWWISE,
    },
    "mpnet": {
        "layer.*.attention.attn.q": COLWISE,
        "layer.*.attention.attn.k": COLWISE,
        "layer.*.attention.attn.v": COLWISE,
        "layer.*.attention.attn.o": ROWWISE,
        "layer.*.intermediate.dense": COLWISE,
        "layer.*.output.dense": ROWWISE,
        "encoder.relative_attention_bias": HEAD_COLUMNS,
    },
    "vit": _VIT,
    "deit": _VIT,
}


def tensor_plan(module: PreTrainedModel, model_id: str) -> dict[str, str]:
    """Path of each module that is split -> its style, one of the names above.

    The input embedding and the output head are split over the vocabulary, whatever the plan says of them.
    Raises CheckpointError if the architecture has no plan, or one that asks for something else.
    """
    rules = [(_pattern(key, anywhere=False), style) for key, style in (module._tp_plan or {}).items()]
    rules += [(_pattern(key, anywhere=True), style) for key, style in _OWN.get(module.config.model_type, {}).items()]
    ends = _vocabulary_ends(module)
    styles: dict[str, str] = {}
    remedy = "set tensor_parallel to 1; pipeline_parallel can split it between its layers"
    where = f'model "{model_id}": {type(module).__name__}'
    owners = dict(module.named_modules())
    for name in [*owners, *(name for name, _ in module.named_parameters(remove_duplicate=False))]:
        owner = name if name in owners else name.removesuffix(".weight").removesuffix(".bias")
        if owner in ends:
            continue
        style = next((style for pattern, style in rules if pattern.fullmatch(name)), None)
        if style is None or style in _REPLICATED:
            continue
        if style not in _NAMES:
            raise CheckpointError(f'{where} needs the split "{style}" of {name}, which is not supported; {remedy}')
        if owner not in owners:
            raise CheckpointError(f'{where} needs the split "{style}" of the bare tensor {name}; {remedy}')
        styles[owner] = _NAMES[style]
    if not styles:
        raise CheckpointError(f"{where} has no plan for tensor parallelism; {remedy}")
    return styles | ends


def _vocabulary_ends(module: PreTrainedModel) -> dict[str, str]:
    """Path and style of the embedding of tokens and of the head that gives logits, those that there are."""
    paths = {id(part): path for path, part in module.named_modules()}
    ends: dict[str, str] = {}
    try:
        embedding = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model that embeds no tokens
        embedding = None
    if isinstance(embedding, nn.Embedding) and id(embedding) in paths:
        ends[paths[id(embedding)]] = VOCABULARY
    head = cast(Any, module).get_output_embeddings()
    if isinstance(head, nn.Linear) and id(head) in paths:
        ends[paths[id(head)]] = GATHERED
    return ends


def _pattern(key: str, *, anywhere: bool) -> re.Pattern[str]:
    """For paths like `key`, where * is one part; `anywhere`: whatever stands before it."""
    return re.compile((r"(?:.*\.)?" if anywhere else "") + re.escape(key).replace(r"\*", r"[^.]+"))
