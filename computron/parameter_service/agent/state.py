"""An optimizer's state as torch has it, read from the aggregators and written to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from computron.parameter_service.agent.progress import PARAMETERS
from computron.parameter_service.agent.training import Trainer
from computron.parameter_service.layout import Block
from computron.parameter_service.versions.snapshot import state_names
from computron.parameter_service.wire.messages import Contents, ExtraTaken, Read, Write, Written


def read_state(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Of each tensor, as torch's optimizer keeps it; nothing before the first step."""
    trainer.wait()
    layout, spec = trainer.layout, trainer.spec
    parts = state_names(spec)
    if not trainer.steps or not parts:
        return [{} for _ in layout.tensors]
    flat = {part: torch.empty(layout.elements) for part in parts}
    updates = [0] * len(layout.blocks)
    answers = _Answers(trainer, len(parts) * len(layout.blocks))

    def note(answer: Contents | Written | ExtraTaken) -> None:
        if isinstance(answer, Contents):
            updates[answer.block] = answer.updates
        answers.one()

    for block in layout.blocks:
        for part in parts:
            trainer.session.ask(Read(spec.job, block.index, part), _bytes_of(flat[part], block), note)
    answers.wait()
    states: list[dict[str, Tensor]] = []
    for index, (tensor, offset) in enumerate(zip(layout.tensors, layout.offsets, strict=True)):
        state = {part: flat[part][offset : offset + tensor.elements].view(tensor.shape).clone() for part in parts}
        if spec.optimizer != "sgd":
            state = {"step": torch.tensor(float(updates[layout.blocks_of(index)[0]])), **state}
        states.append(state)
    return states


def write_state(trainer: Trainer, states: Sequence[Mapping[str, Any]]) -> None:
    """The job goes on from these states, one for each tensor, and from the lowest rank's parameters. All workers call
    it between the same two steps. Raises ValueError if a state has not what the optimizer needs.
    """
    trainer.wait()
    layout, spec = trainer.layout, trainer.spec
    parts = state_names(spec)
    lacking = {part for state in states for part in parts if state.get(part) is None}
    if lacking and any(states):
        raise ValueError(f"the state has no {', '.join(sorted(lacking))} of some parameters")
    updates = [int(state.get("step", 1 if state else 0)) for state in states]  # SGD does not count them
    step = trainer.steps
    if trainer.session.progress.rank == min(trainer.members):
        trainer.load()
        flat = {part: torch.zeros(layout.elements) for part in parts}
        for state, tensor, offset in zip(states, layout.tensors, layout.offsets, strict=True):
            for part in parts if state else ():
                flat[part][offset : offset + tensor.elements].copy_(state[part].reshape(-1))
        answers = _Answers(trainer, (1 + len(parts)) * len(layout.blocks))
        session, epoch = trainer.session, trainer.session.progress.epoch
        for block in layout.blocks:
            seen = updates[block.pieces[0].tensor]
            for part in parts:
                message = Write(spec.job, epoch, block.index, part, step, False)
                session.ask(message, _bytes_of(flat[part], block), answers.one)
            last = Write(spec.job, epoch, block.index, PARAMETERS, step, True, seen)
            session.ask(last, session.parameters.bytes_of(block), answers.one)
        answers.wait()


class _Answers:
    """Counts answers, which come in the loop's thread."""

    def __init__(self, trainer: Trainer, awaited: int) -> None:
        self._session = trainer.session
        self._left = awaited

    def one(self, _: object = None) -> None:
        self._left -= 1

    def wait(self) -> None:
        self._session.wait(lambda: self._left <= 0)


def _bytes_of(flat: Tensor, block: Block) -> memoryview:
    elements: Any = flat[block.start : block.start + block.elements].numpy()
    return memoryview(elements).cast("B")
