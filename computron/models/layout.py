"""The parameter image: which tensor stands where, and which stage of the forward pass it belongs to.

Stages follow the order in which modules were registered, which is the order of use in nearly every model. A model that
uses its modules in another order is still right, since every module waits for its own stage (`gates`); it starts later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

ALIGNMENT = 256  # bytes: what every kernel's vector loads and every copy engine are content with


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A tensor of the image: `nbytes` at `offset`, row-major. `name`: as in the module's state dict."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """`aliases`: names of tied tensors -> the name that holds the bytes. `stages`: names, one for each segment."""

    slots: tuple[TensorSlot, ...]
    stages: tuple[str, ...]
    segment_ends: tuple[int, ...]
    aliases: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return self.segment_ends[-1]

    def stage_of(self) -> dict[str, int]:
        """Stage of every tensor name, aliases included."""
        stage, stages = 0, {}
        for slot in self.slots:
            while slot.offset >= self.segment_ends[stage] and stage < len(self.stages) - 1:
                stage += 1
            stages[slot.name] = stage
        return stages | {alias: stages[name] for alias, name in self.aliases.items()}


def persistent_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers in registration order, a shared one under each of its names."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = prefix + "." if prefix else ""
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield dot + name, parameter
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield dot + name, buffer


def main_list(module: nn.Module) -> str | None:
    """Path of the ModuleList or Sequential that holds the most bytes, the outermost of equals; None without one."""
    best, best_bytes = None, 0
    for path, child in module.named_modules():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            nbytes = sum(tensor.nbytes for tensor in child.parameters())
            if nbytes > best_bytes:
                best, best_bytes = path, nbytes
    return best


def model_stages(module: nn.Module, names: Iterable[str], first: Iterable[str] = ()) -> list[tuple[str, list[str]]]:
    """Stages of a model with one stack of layers: what stands before it, each layer, what stands after it.

    `names`: the tensors to place, in registration order. `first`: those that are used first wherever they stand.
    """
    names, first = list(names), frozenset(first)
    path = main_list(module)
    if path is None:
        return [("all", names)]
    prefix = path + "." if path else ""
    before: list[str] = [name for name in names if name in first]
    after: list[str] = []
    layers: dict[str, list[str]] = {key: [] for key, _ in module.get_submodule(path).named_children()}
    seen = False
    order = {name: position for position, name in enumerate(n for n, _ in persistent_tensors(module))}
    for name in sorted(names, key=order.__getitem__):
        if name in first:
            continue
        if name.startswith(prefix):
            layers[name[len(prefix) :].split(".", 1)[0]].append(name)
            seen = True
        else:
            (after if seen else before).append(name)
    stages = [("embeddings", before), *((prefix + key, tensors) for key, tensors in layers.items()), ("head", after)]
    return [(name, tensors) for name, tensors in stages if tensors]


def module_stages(module: nn.Module, names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Stages of any module: one for each child, where lists and sequences count as their children.

    A stage of less than a hundredth of the bytes joins the next one: a wait for it would be worth nothing.
    """
    names = list(names)
    path = main_list(module)
    tensors = dict(persistent_tensors(module))
    pieces: dict[str, list[str]] = {}
    for name in names:
        pieces.setdefault(_piece(module, name, path), []).append(name)
    total = sum(tensors[name].nbytes for name in names)
    stages: list[tuple[str, list[str]]] = []
    joined: list[str] = []
    for piece, members in pieces.items():
        joined += members
        if sum(tensors[name].nbytes for name in joined) * 100 >= total:
            stages.append((piece or "all", joined))
            joined = []
    if joined and stages:
        stages[-1][1].extend(joined)
    elif joined:
        stages.append(("all", joined))
    return stages


def _piece(module: nn.Module, name: str, path: str | None) -> str:
    """The shortest path above this tensor that is neither a list nor holds the main list."""
    parts = name.split(".")[:-1]
    node, here = module, ""
    for part in parts:
        on_spine = path is not None and (here == "" or path == here or path.startswith(here + "."))
        if here and not on_spine and not isinstance(node, nn.ModuleList | nn.Sequential):
            break
        node = node.get_submodule(part)
        here = f"{here}.{part}" if here else part
    return here


def lay_out(
    stages: Iterable[tuple[str, list[str]]],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    aliases: Mapping[str, str],
) -> Layout:
    """Give each tensor its place, stage after stage. `tensors`: dtype and shape of each name."""
    slots: list[TensorSlot] = []
    names, ends, offset = [], [], 0
    for stage, members in stages:
        for name in members:
            dtype, shape = tensors[name]
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            slots.append(TensorSlot(name, dtype, shape, offset, nbytes))
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        names.append(stage)
        ends.append(offset)
    if not names:
        names, ends = ["all"], [0]
    return Layout(tuple(slots), tuple(names), tuple(ends), dict(aliases))
