"""What goes from layer to layer: found by one forward on the meta device, where every operation is watched.

A pipeline stage gets the hidden states and nothing else. So nothing else that comes from weights may reach a layer,
or what stands after the last one: a model that hands on anything more is refused, not served wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from computron.config import ModelConfig
from computron.errors import CheckpointError
from computron.models.geometry import meta_forward
from computron.models.layout import main_list, persistent_tensors

# These look at a tensor's shape, dtype and device only.
_SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")


@dataclass(frozen=True, slots=True)
class Flow:
    """`layers`: path of their list. `outputs`: of each layer, the length of the tuple it returns; 0: a bare tensor.

    `before` and `after`: tensors that are read before the first layer and after the last one.
    """

    layers: str
    outputs: tuple[int, ...]
    before: frozenset[str]
    after: frozenset[str]


def observe(module: PreTrainedModel, model: ModelConfig) -> Flow:
    """The flow through a whole module on the meta device.

    Raises CheckpointError if it is not a sequence of layers, each of which gets hidden states from the one before.
    """
    refusal = f'model "{model.id}": {type(module).__name__} cannot be split over stages: '
    path = main_list(module)
    if path is None or getattr(module.config, "is_encoder_decoder", False):
        raise CheckpointError(refusal + "it is not one list of layers; set pipeline_parallel to 1")
    layers = list(module.get_submodule(path).children())
    watch = _Watch(module, path, len(layers))
    hooks = [
        hook
        for index, layer in enumerate(layers)
        for hook in (
            layer.register_forward_pre_hook(watch.entering(index), with_kwargs=True),
            layer.register_forward_hook(watch.leaving(index)),
        )
    ]
    try:
        with watch:
            meta_forward(module, model)
        watch.check_end()
    except _Refused as error:
        raise CheckpointError(f"{refusal}{error}; set pipeline_parallel to 1") from error
    except Exception as error:
        raise CheckpointError(
            f"{refusal}its forward does not run without weights ({error!r}); set pipeline_parallel to 1"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return Flow(path, tuple(watch.outputs), frozenset(watch.before), frozenset(watch.after))


class _Refused(Exception):
    """In words: what else than hidden states goes from layer to layer."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`_age` of a tensor that comes from weights: how many times hidden states had been handed on when it was made."""

    def __init__(self, module: nn.Module, path: str, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: list[int] = []
        self.before: set[str] = set()
        self.after: set[str] = set()
        self._names = {id(tensor): name for name, tensor in persistent_tensors(module)}
        self._path = path
        self._count = count
        self._entered = 0
        self._now = 0
        self._age: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []  # so that no id is given twice
        self._hidden: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _SHAPE_ONLY:
            return output
        names = [self._names[id(tensor)] for tensor in given if id(tensor) in self._names]
        self._use(names)
        if any(self._age.get(id(tensor), self._now) < self._now for tensor in given):
            raise _Refused(f"{self._place()} reads more of what was computed before it than hidden states")
        if names or any(id(tensor) in self._age for tensor in given):
            self._mark(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        return output

    def entering(self, index: int) -> Any:
        def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = arguments[0] if arguments else named.get("hidden_states")
            if index != self._entered or not isinstance(hidden, torch.Tensor):
                raise _Refused(f"layer {index} is not called once, in order, with hidden states")
            if index > 0 and hidden is not self._hidden:
                raise _Refused(f"hidden states are changed between layers {index - 1} and {index}")
            self._entered += 1
            self._hand_on(hidden)

        return enter

    def leaving(self, index: int) -> Any:
        def leave(_: nn.Module, arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not isinstance(hidden, torch.Tensor) or self._hidden is None:
                raise _Refused(f"layer {index} returns a {type(output).__name__}")
            if hidden.shape != self._hidden.shape or hidden.dtype != self._hidden.dtype:
                raise _Refused(f"layer {index} changes the shape of its hidden states")
            self.outputs.append(len(output) if isinstance(output, tuple) else 0)
            self._hand_on(hidden)

        return leave

    def check_end(self) -> None:
        if len(self.outputs) != self._count:
            raise _Refused(f"its forward calls {len(self.outputs)} of its {self._count} layers")

    def _hand_on(self, hidden: torch.Tensor) -> None:
        self._now += 1
        self._hidden = hidden
        self._mark([hidden])

    def _mark(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self._age[id(tensor)] = self._now
            self._kept.append(tensor)

    def _use(self, names: list[str]) -> None:
        if self._entered == 0:
            self.before.update(names)
        elif len(self.outputs) == self._count:
            self.after.update(names)
        else:
            prefix = f"{self._path}.{self._entered - 1}."
            if foreign := [name for name in names if not name.startswith(prefix)]:
                raise _Refused(f"layer {self._entered - 1} reads {foreign[0]}")

    def _place(self) -> str:
        return "the head" if len(self.outputs) == self._count else f"layer {self._entered - 1}"
