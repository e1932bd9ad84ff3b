"""Pipeline parallelism: which layers a stage holds, and how a forward runs on one stage alone.

Every node runs the model's own forward. What stands before the layers is cheap, and gives a later stage its masks,
positions and the shape of its hidden states; the layers of the stages before it hand on what they are given.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from computron.models.flow import Flow
from computron.models.layout import persistent_tensors
from computron.models.shard import Communicator

_LEAVES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class HandedOn(Exception):
    """The hidden states are on their way to the next stage; nothing more is to be computed here."""


def balance(before: int, layers: Sequence[int], after: int, stages: int) -> list[range]:
    """Layers of each stage: the largest stage as small as can be, and then the others as even as can be.

    `before` and `after`: bytes that the first and the last stage hold beside their layers. stages <= len(layers).
    """
    ends = [0, *itertools.accumulate(layers)]
    count = len(layers)

    def cost(stage: int, begin: int, end: int) -> int:
        return ends[end] - ends[begin] + (before if stage == 0 else 0) + (after if stage == stages - 1 else 0)

    def best(largest: float, power: int) -> list[tuple[float, tuple[int, ...]]]:
        """For each number of layers in the stages so far: cost of the best cut, and where it cuts."""
        row: list[tuple[float, tuple[int, ...]]] = [(0, ())] + [(float("inf"), ())] * count
        for stage in range(stages):
            new: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * (count + 1)
            for end in range(stage + 1, count + 1):
                for begin in range(stage, end):
                    size = cost(stage, begin, end)
                    total = max(row[begin][0], size) if power == 1 else row[begin][0] + size**power
                    if size <= largest and total < new[end][0]:
                        new[end] = (total, (*row[begin][1], end))
            row = new
        return row

    largest = best(float("inf"), 1)[count][0]
    cuts = best(largest, 2)[count][1]
    return [range(begin, end) for begin, end in itertools.pairwise((0, *cuts))]


def connect_stage(module: nn.Module, flow: Flow, own: range, communicator: Communicator) -> None:
    """Let the forward of `module` run the layers `own` only. Before the tensors that are not here are replaced."""
    layers = list(module.get_submodule(flow.layers).children())
    for index in range(own.start):
        layers[index].forward = _hand_through(flow.outputs[index])
    if own.start > 0:
        layers[own.start].register_forward_pre_hook(_receive(communicator), with_kwargs=True)
    if own.stop < len(layers):
        layers[own.stop - 1].register_forward_hook(_send(communicator))
    for index in own:
        for part in layers[index].modules():
            number = getattr(part, "layer_idx", None)
            if isinstance(number, int):
                part.layer_idx = number - own.start  # type: ignore[assignment]  # the place in this stage's cache


def skip_absent(module: nn.Module, flow: Flow) -> None:
    """Let products and look-ups whose weights are elsewhere, outside of the layers, give zeros of the right shape."""
    for path, part in module.named_modules():
        if isinstance(part, _LEAVES) and not path.startswith(flow.layers + ".") and part.weight.is_meta:
            cast(Any, part).__class__ = _zeros_instead(type(part), copy.deepcopy(part).to("meta"))


def replace_absent(module: nn.Module, device: torch.device) -> None:
    """Give what is still on the meta device zeros on `device` that take no memory."""
    for name, tensor in list(persistent_tensors(module)):
        if tensor.is_meta:
            path, _, attribute = name.rpartition(".")
            zeros = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            value = nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
            setattr(module.get_submodule(path), attribute, value)


def _hand_through(outputs: int) -> Any:
    def forward(*arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named["hidden_states"]
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    return forward


def _receive(communicator: Communicator) -> Any:
    def replace(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if arguments:
            return (communicator.receive(arguments[0]), *arguments[1:]), named
        return arguments, named | {"hidden_states": communicator.receive(named["hidden_states"])}

    return replace


def _send(communicator: Communicator) -> Any:
    def hand_on(_: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        communicator.send(hidden.contiguous())
        raise HandedOn

    return hand_on


def _zeros_instead(kind: type[nn.Module], twin: nn.Module) -> type[nn.Module]:
    """`twin`: the layer on the meta device, which knows what shape its output has."""

    def forward(self: nn.Module, *arguments: Any, **named: Any) -> torch.Tensor:
        given = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (arguments, named))
        output = twin(*given[0], **given[1])
        return torch.zeros(output.shape, dtype=output.dtype, device=cast(Any, self).weight.device)

    return type(f"Absent{kind.__name__}", (kind,), {"forward": forward})
