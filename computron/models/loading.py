"""A model whose weights are an address range: the module is built without any, and its parameters become views."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from computron.errors import BadRequest
from computron.memory.gate import Gate
from computron.models.custom import BatchManager, give_communicator, make_batch_manager
from computron.models.gates import StageWaits
from computron.models.layout import persistent_tensors
from computron.models.pipeline import HandedOn
from computron.models.plan import ModelPlan
from computron.models.shard import Communicator
from computron.models.text import render_chat


class LoadedModel:
    """A module in evaluation mode whose tensors are views of `parameters`, without gradients.

    Set `gate` before a forward: each module then waits for its stage before it reads its tensors.
    """

    def __init__(self, plan: ModelPlan, module: nn.Module, device: torch.device) -> None:
        self.plan = plan
        self.module = module
        self.device = device
        self._waits = StageWaits(module, plan.layout.stage_of(), device)

    def forward(self, *arguments: Any, **named: Any) -> Any | None:
        """The module's output; None where the stage is not the last one and the next goes on with its hidden states.

        Raises GroupBroken if the model is split and its nodes lose each other.
        """
        try:
            output = self.module(*arguments, **named)
        except HandedOn:
            return None
        return output if self.plan.shard.last else None

    @functools.cached_property
    def batch_manager(self) -> BatchManager:
        """Of a custom model. Raises ConfigError if it cannot be made."""
        return make_batch_manager(self.plan.config, self.module)

    @property
    def gate(self) -> Gate:
        return self._waits.gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        self._waits.set(gate)

    @property
    def tokenizer(self) -> Any:
        return self.plan.tokenizer

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an answer: the generation config's and the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        return frozenset(self.plan.generation.eos) | (frozenset() if own is None else {int(own)})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Raises BadRequest for an id outside the vocabulary."""
        if any(not 0 <= token < self.plan.vocabulary for token in ids):
            raise BadRequest(f"token ids must be between 0 and {self.plan.vocabulary - 1}", param="prompt")
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def pixels(self, data: bytes) -> torch.Tensor:
        """Tensor (C x H x W, float32, on the CPU) of an image file's bytes. Raises BadRequest if they are no image."""
        return self.plan.image_processor(data)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The messages as one prompt by the chat template; encode it without adding special tokens.

        `arguments` go to the template: add_generation_prompt (default true), continue_final_message, tools, and what
        the template itself knows. Raises BadRequest if there is no template or it refuses them.
        """
        return render_chat(self.tokenizer, self.plan.config.id, messages, **arguments)


def load_model(
    plan: ModelPlan,
    parameters: torch.Tensor,
    *,
    attention: str | None = None,
    communicator: Communicator | None = None,
) -> LoadedModel:
    """Build the module around `parameters`: uint8, at least `plan.image.nbytes` long, at its device address for good.

    Nothing of `parameters` is read. `attention`: a name known to transformers' attention interface; None leaves the
    choice to transformers. `communicator`: what the parts of a split model talk through.
    Raises CheckpointError or ConfigError if the module or its batch manager cannot be built.
    """
    module = plan.build(parameters.device, attention)
    bind(module, plan, parameters)
    if not plan.shard.whole:
        if communicator is None:
            raise ValueError("a part of a model needs a communicator")
        if plan.split is not None:
            plan.split.connect(module, frozenset(plan.layout.stage_of()), communicator, parameters.device)
        else:
            give_communicator(module, communicator)
    model = LoadedModel(plan, module, parameters.device)
    if plan.task == "custom":
        _ = model.batch_manager  # what is wrong with it is better said now
    return model


def bind(module: nn.Module, plan: ModelPlan, parameters: torch.Tensor) -> None:
    """Replace every tensor of the image by a view of `parameters`; tied names share one."""
    if parameters.dtype != torch.uint8 or parameters.dim() != 1 or len(parameters) < plan.image.nbytes:
        raise ValueError(f"parameters must be a flat uint8 tensor of at least {plan.image.nbytes} bytes")
    views = {
        slot.name: parameters[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)
        for slot in plan.tensors
    }
    bound: dict[str, torch.Tensor] = {}
    for name, tensor in list(persistent_tensors(module)):
        source = plan.aliases.get(name, name)
        if source not in views:
            continue
        if source not in bound:
            view = views[source]
            bound[source] = nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
        path, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(path), attribute, bound[source])
