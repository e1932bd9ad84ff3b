"""One node's part of a transformers model: which tensors it holds, laid out as an image, and how it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from computron.config import ModelConfig
from computron.errors import CheckpointError
from computron.models.flow import Flow, observe
from computron.models.geometry import CacheGeometry, build_probed, meta_forward
from computron.models.images import LaidOutImage
from computron.models.layout import Layout, lay_out, model_stages, persistent_tensors
from computron.models.pipeline import balance, connect_stage, replace_absent, skip_absent
from computron.models.pretrained import embedding_names
from computron.models.shard import Communicator, Shard
from computron.models.sliced_image import slice_image
from computron.models.tensor_parallel import NoCommunicator, Part, TensorSplit, plan_tensor_split


@dataclass(frozen=True)
class Split:
    """`flow` and `own`, the layers of this stage: None if the model is not cut between its layers."""

    shard: Shard
    tensors: TensorSplit
    flow: Flow | None = None
    own: range | None = None

    def resize(self, module: nn.Module) -> None:
        """Make a whole module, on the meta device but for what no checkpoint holds, this node's part."""
        self.tensors.resize(module)

    def prepare(self, module: nn.Module) -> None:
        """The same, so that it runs on the meta device, with all layers."""
        self.resize(module)
        self.tensors.connect(module, NoCommunicator(), {name for name, _ in persistent_tensors(module)})

    def connect(
        self, module: nn.Module, held: frozenset[str], communicator: Communicator, device: torch.device
    ) -> None:
        """Put in what talks to the other nodes, once the tensors that are `held` here are bound."""
        self.tensors.connect(module, communicator, held)
        if self.flow is not None and self.own is not None:
            skip_absent(module, self.flow)
            connect_stage(module, self.flow, self.own, communicator)
        replace_absent(module, device)


def plan_split(model: ModelConfig, config: PretrainedConfig, whole: Layout, shard: Shard) -> Split:
    """`whole`: layout of the whole model. Raises CheckpointError, with numbers, if it cannot be split so."""
    module = build_probed(model, config)
    flow: Flow | None = None
    own: range | None = None
    if shard.pipeline_parallel > 1:
        flow = observe(module, model)
        own = _own_layers(model, flow, whole, shard)
    tensors = plan_tensor_split(module, shard, model.id)
    if shard.tensor_parallel > 1:
        expected = meta_forward(module, model)
        Split(shard, tensors).prepare(module)
        problem = _difference(module, model, expected)
        if problem:
            raise CheckpointError(
                f'model "{model.id}": {type(module).__name__} cannot be split over {shard.tensor_parallel} nodes: '
                f"{problem}; set tensor_parallel to 1; pipeline_parallel can split it between its layers"
            )
    return Split(shard, tensors, flow, own)


def split_image(
    split: Split, module: PreTrainedModel, whole: Layout, image: LaidOutImage
) -> tuple[Layout, LaidOutImage]:
    """Layout and bytes of the part. `module`: whole, on the meta device; it becomes the part."""
    embeddings = set(embedding_names(module))
    parts = split.tensors.resize(module)
    slots = {slot.name: slot for slot in whole.slots}
    held = [
        name
        for name, _ in persistent_tensors(module)
        if whole.aliases.get(name, name) in slots and _is_held(split, name, parts)
    ]
    aliases: dict[str, str] = {}
    holders: dict[tuple[str, Part | None], str] = {}
    for name in held:
        holder = holders.setdefault((whole.aliases.get(name, name), parts.get(name)), name)
        if holder != name:
            aliases[name] = holder
    sources = {holder: key for key, holder in holders.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in persistent_tensors(module)}
    described = {name: (slots[source].dtype, shapes[name]) for name, (source, _) in sources.items()}
    first = {aliases.get(name, name) for name in embeddings & set(held)}
    layout = lay_out(model_stages(module, sources, first), described, aliases)
    return layout, slice_image(image, layout, sources)


def split_cache(split: Split, cache: CacheGeometry) -> CacheGeometry:
    """What this stage's layers keep. `cache`: what all layers of the part keep."""
    return cache if split.own is None else dataclasses.replace(cache, layers=len(split.own))


def _own_layers(model: ModelConfig, flow: Flow, whole: Layout, shard: Shard) -> range:
    count = len(flow.outputs)
    if count < shard.pipeline_parallel:
        raise CheckpointError(
            f'model "{model.id}": {count} layers cannot be split over {shard.pipeline_parallel} stages; '
            f"set pipeline_parallel to {count} or less"
        )
    sizes = {slot.name: slot.nbytes for slot in whole.slots}
    layers = [0] * count
    for name, nbytes in sizes.items():
        if name.startswith(flow.layers + "."):
            layers[_layer(name, flow)] += nbytes
    before, after = (
        sum(sizes[name] for name in {whole.aliases.get(name, name) for name in names} if name in sizes)
        for names in (flow.before, flow.after)
    )
    return balance(before, layers, after, shard.pipeline_parallel)[shard.stage]


def _layer(name: str, flow: Flow) -> int:
    return int(name[len(flow.layers) + 1 :].split(".", 1)[0])


def _is_held(split: Split, name: str, parts: Mapping[str, Part | None]) -> bool:
    if name in parts and parts[name] is None:
        return False
    flow, own, shard = split.flow, split.own, split.shard
    if flow is None or own is None:
        return True
    if name.startswith(flow.layers + "."):
        return _layer(name, flow) in own
    if name in flow.before or name in flow.after:
        return (shard.first and name in flow.before) or (shard.last and name in flow.after)
    return shard.last  # read in no forward: some place it must have


def _difference(module: PreTrainedModel, model: ModelConfig, expected: torch.Tensor) -> str | None:
    """What keeps a part from giving an output like the whole one's `expected`, in words."""
    try:
        output = meta_forward(module, model)
    except Exception as error:
        return f"its forward does not run on a part of it ({error!r})"
    if output.shape == expected.shape:
        return None
    return f"a part of it gives {list(output.shape)} where the whole gives {list(expected.shape)}"
