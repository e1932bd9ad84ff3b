"""Modules wait for their own weights: hooks that ask a gate for the stage that a module is about to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from computron.memory.gate import OPEN, Gate
from computron.models.layout import persistent_tensors


class StageWaits:
    """The hooks of one module. They exist only while a gate is closed, so that other runs pay nothing for them."""

    def __init__(self, module: nn.Module, stage_of: Mapping[str, int], device: torch.device) -> None:
        self._points = waiting_points(module, stage_of)
        self._device = device
        self._handles: list[RemovableHandle] = []
        self._gate: Gate = OPEN
        self._passed: set[int] = set()

    @property
    def gate(self) -> Gate:
        return self._gate

    def set(self, gate: Gate) -> None:
        """Wait at this gate from the next forward on."""
        self._gate = gate
        self._passed = set()
        if gate.is_open:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        elif not self._handles:
            self._handles = [module.register_forward_pre_hook(self._hook(stage)) for module, stage in self._points]

    def _hook(self, stage: int) -> Any:
        def wait(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if stage not in self._passed:
                stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
                self._gate.wait(stage, stream)
                self._passed.add(stage)

        return wait


def waiting_points(module: nn.Module, stage_of: Mapping[str, int]) -> list[tuple[nn.Module, int]]:
    """(module, stage) pairs such that no tensor is read before its stage has been waited for.

    1. A module that owns tensors waits for the last stage among them, also when something calls it out of order.
    2. A module whose tensors, with those of all modules below it, are in one stage waits for that stage: it may read
       the tensors of the modules below it without calling them.
    """
    points: list[tuple[nn.Module, int]] = []
    stages: dict[str, set[int]] = {}
    for name, _ in persistent_tensors(module):
        if name in stage_of:
            parts = name.split(".")[:-1]
            for depth in range(len(parts) + 1):
                stages.setdefault(".".join(parts[:depth]), set()).add(stage_of[name])
    seen: set[int] = set()
    for path, owner in module.named_modules(remove_duplicate=False):
        below = stages.get(path)
        if below is None or id(owner) in seen:
            continue
        prefix = path + "." if path else ""
        own = [stage_of[prefix + n] for n in (owner._parameters | owner._buffers) if prefix + n in stage_of]
        parent = stages.get(path.rpartition(".")[0], set()) if path else set()
        if len(below) == 1 and (own or len(parent) != 1 or not path):
            points.append((owner, max(below)))
        elif own:
            points.append((owner, max(own)))
        else:
            continue
        seen.add(id(owner))
    return points
