"""Tensor parallelism: a module on the meta device becomes one node's slice of itself, and its collectives are put in.

A row-parallel layer's bias is held by the stage's first node alone, so that the sum holds it once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from computron.errors import CheckpointError
from computron.models import tensor_plans as plans
from computron.models.shard import Communicator, Shard
from computron.models.tensor_plans import tensor_plan

Range = tuple[int, int]
_QUERIES = ("q_proj", "query", "q_lin", "q")
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "k", "v")
_FUSED = ("c_attn", "query_key_value", "Wqkv")  # as many heads of each kind
_LATENT = ("q_b_proj", "kv_b_proj")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_HEAD_WIDTHS = ("all_head_size", "split_size")
_SUMMED = (plans.ROWWISE, plans.PACKED_ROWWISE, plans.SPLITTING_ROWWISE)


@dataclass(frozen=True, slots=True)
class Part:
    """What a node holds of a tensor: these `ranges` of dimension `dim`, one after the other."""

    dim: int
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        return sum(end - begin for begin, end in self.ranges)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.narrow(self.dim, begin, end - begin) for begin, end in self.ranges], self.dim)


@dataclass(frozen=True, slots=True)
class Heads:
    """Of an attention module: what there are, and what each node gets."""

    queries: int
    key_values: int
    nodes: int

    @property
    def local_key_values(self) -> int:
        return max(self.key_values // self.nodes, 1)


@dataclass(frozen=True, slots=True)
class Cut:
    """The split of the module at `path`. `sizes`: the width of every node's part of the dimension that is split."""

    path: str
    style: str
    ranges: tuple[Range, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorSplit:
    """How a module is split for one node. `heads`: of each attention module that is split, by its path."""

    shard: Shard
    cuts: tuple[Cut, ...]
    heads: Mapping[str, Heads]

    def resize(self, module: nn.Module) -> dict[str, Part | None]:
        """Make the module this node's slice. Gives what is held of each tensor that is not whole; None: nothing."""
        parts: dict[str, Part | None] = {}
        for cut in self.cuts:
            owner = module.get_submodule(cut.path)
            for name, part in _parts(owner, cut, self.shard.tensor_rank).items():
                parts[f"{cut.path}.{name}"] = part
                if part is not None:
                    setattr(owner, name, nn.Parameter(part.of(getattr(owner, name)), requires_grad=False))
                elif isinstance(owner, nn.Linear):
                    setattr(owner, name, None)
            _tell_size(owner, cut)
        for path, heads in self.heads.items():
            _tell_heads(module.get_submodule(path), heads)
        return parts

    def connect(self, module: nn.Module, communicator: Communicator, held: Container[str]) -> None:
        """Put collectives into the split modules whose weight is `held`."""
        for cut in self.cuts:
            owner = module.get_submodule(cut.path)
            if f"{cut.path}.weight" in held:
                _connect(owner, cut, communicator, self.shard.tensor_rank)


NO_SPLIT = TensorSplit(Shard(), (), {})


def plan_tensor_split(module: PreTrainedModel, shard: Shard, model_id: str) -> TensorSplit:
    """For a whole module. Raises CheckpointError if its architecture, or its numbers, cannot be split so."""
    if shard.tensor_parallel == 1:
        return NO_SPLIT
    styles = tensor_plan(module, model_id)
    heads = {
        path: _heads(module, path, styles, shard.tensor_parallel, model_id)
        for path in sorted({_parent(path) for path, style in styles.items() if _is_attention(path, style)})
    }
    cuts = [_cut(module, path, style, heads.get(_parent(path)), shard, model_id) for path, style in styles.items()]
    return TensorSplit(shard, tuple(cuts), heads)


def shares(size: int, nodes: int) -> list[Range]:
    """Consecutive ranges, as even as they can be, the larger ones first."""
    small, more = divmod(size, nodes)
    ends = [0, *itertools.accumulate(small + (node < more) for node in range(nodes))]
    return list(itertools.pairwise(ends))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _is_attention(path: str, style: str) -> bool:
    return style in (plans.COLWISE, plans.PACKED_COLWISE) and _leaf(path) in (*_QUERIES, *_FUSED)


def _heads(module: PreTrainedModel, path: str, styles: Mapping[str, str], nodes: int, model_id: str) -> Heads:
    attention = module.get_submodule(path)
    if attention._parameters:
        raise CheckpointError(
            f'model "{model_id}": {path}, a {type(attention).__name__}, has weights of its own '
            f"({', '.join(attention._parameters)}), which cannot be split; "
            "set tensor_parallel to 1; pipeline_parallel can split the model between its layers"
        )
    config = getattr(attention, "config", None) or module.config.get_text_config()
    queries = next(
        (n for name in _HEAD_COUNTS if isinstance(n := getattr(attention, name, None), int)),
        int(config.num_attention_heads),
    )
    key = next((name for name in _KEYS_VALUES if f"{path}.{name}" in styles), None)
    key_values = queries
    if key is not None:
        dim = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
        known = getattr(config, "num_key_value_heads", None) or queries
        key_values = _widths(attention.get_submodule(key))[1] // int(dim) if dim else int(known)

    def fits(count: int) -> bool:
        return queries % count == 0 and (key_values % count == 0 or count % key_values == 0)

    if not fits(nodes):
        *others, last = (str(count) for count in range(1, queries + 1) if fits(count))
        numbers = ", ".join(others) + (f" or {last}" if others else last)
        grouped = f" with {key_values} key-value heads" if key_values != queries else ""
        raise CheckpointError(
            f'model "{model_id}": {queries} attention heads{grouped} cannot be split over {nodes} nodes; '
            f"set tensor_parallel to {numbers}"
        )
    return Heads(queries, key_values, nodes)


def _cut(module: nn.Module, path: str, style: str, heads: Heads | None, shard: Shard, model_id: str) -> Cut:
    owner, nodes, rank = module.get_submodule(path), shard.tensor_parallel, shard.tensor_rank
    where = f'model "{model_id}": {path}'
    if _leaf(path) in (*_LATENT, "linear") or not isinstance(owner, nn.Linear | Conv1D | nn.Embedding):
        raise CheckpointError(
            f'{where}, a {type(owner).__name__}, cannot be split as "{style}"; '
            "set tensor_parallel to 1; pipeline_parallel can split the model between its layers"
        )
    ranges: list[tuple[Range, ...]]
    width = _widths(owner)[0 if style in (*_SUMMED, plans.VOCABULARY) else 1]
    if style == plans.COLWISE and heads is not None and _leaf(path) in _KEYS_VALUES:
        dim = width // heads.key_values
        first = [node * heads.key_values // nodes for node in range(nodes)]
        ranges = [((begin * dim, (begin + heads.local_key_values) * dim),) for begin in first]
    elif style in (plans.PACKED_COLWISE, plans.PACKED_ROWWISE):
        blocks = 3 if _leaf(path) in _FUSED else 2
        size = width // blocks
        ranges = [
            tuple((block * size + begin, block * size + end) for block in range(blocks))
            for begin, end in shares(size, nodes)
        ]
    else:
        ranges = [(one,) for one in shares(width, nodes)]
    if width < nodes:
        raise CheckpointError(f"{where} is {width} wide, which {nodes} nodes cannot share; set tensor_parallel lower")
    sizes = tuple(sum(end - begin for begin, end in one) for one in ranges)
    return Cut(path, style, ranges[rank], sizes)


def _widths(owner: nn.Module) -> tuple[int, int]:
    """Input and output."""
    weight = owner.get_parameter("weight")
    return (weight.shape[1], weight.shape[0]) if isinstance(owner, nn.Linear) else (weight.shape[0], weight.shape[1])


def _parts(owner: nn.Module, cut: Cut, rank: int) -> dict[str, Part | None]:
    takes_input = cut.style in (*_SUMMED, plans.VOCABULARY)
    parts: dict[str, Part | None] = {"weight": Part(int(takes_input == isinstance(owner, nn.Linear)), cut.ranges)}
    if getattr(owner, "bias", None) is not None:
        if not takes_input:
            parts["bias"] = Part(0, cut.ranges)
        elif rank > 0:
            parts["bias"] = None
    return parts


def _tell_size(owner: Any, cut: Cut) -> None:
    inputs, outputs = _widths(owner)
    if isinstance(owner, nn.Linear):
        owner.in_features, owner.out_features = inputs, outputs
    elif isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = inputs, outputs
        if cut.style == plans.VOCABULARY:
            owner.padding_idx = None  # matters to training only, and may lie on another node
    else:
        owner.nx, owner.nf = inputs, outputs


def _tell_heads(attention: Any, heads: Heads) -> None:
    queries = heads.queries // heads.nodes
    changes = dict.fromkeys(_HEAD_COUNTS, queries) | dict.fromkeys(_KEY_VALUE_COUNTS, heads.local_key_values)
    changes["num_key_value_groups"] = queries // heads.local_key_values
    for name in _HEAD_WIDTHS:
        changes[name] = getattr(attention, name, 0) // heads.nodes
    for name, value in changes.items():
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, value)


def _connect(owner: nn.Module, cut: Cut, communicator: Communicator, rank: int) -> None:
    if cut.style == plans.VOCABULARY:
        owner.forward = _masked_lookup(owner.forward, cut.ranges[0], communicator)
    elif cut.style == plans.GATHERED:
        owner.register_forward_hook(lambda _, given, output: communicator.all_gather(output, cut.sizes))
    elif cut.style in _SUMMED:
        if cut.style == plans.SPLITTING_ROWWISE:
            begin, end = cut.ranges[0]
            owner.register_forward_pre_hook(lambda _, given: (given[0][..., begin:end], *given[1:]))
        owner.register_forward_hook(lambda _, given, output: communicator.all_reduce(output))


def _masked_lookup(
    lookup: Callable[..., torch.Tensor], rows: Range, communicator: Communicator
) -> Callable[..., torch.Tensor]:
    begin, end = rows

    def forward(ids: torch.Tensor) -> torch.Tensor:
        elsewhere = (ids < begin) | (ids >= end)
        found = lookup((ids - begin).masked_fill_(elsewhere, 0))
        return communicator.all_reduce(found.masked_fill_(elsewhere[..., None], 0))

    return forward


class NoCommunicator:
    """For a forward on the meta device, where only shapes count."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return tensor.new_empty((*tensor.shape[:-1], sum(sizes)))

    def send(self, tensor: torch.Tensor) -> None:
        raise AssertionError("no stage follows on the meta device")

    def receive(self, like: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no stage goes before on the meta device")
