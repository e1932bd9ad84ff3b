"""An optimizer's state as torch has it, read from the aggregators and written to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from computron.parameter_service.agent.training import Trainer
from computron.parameter_service.layout import Block
from computron.parameter_service.specs import PARAMETERS, state_names
from computron.parameter_service.wire.messages import Contents, ExtraTaken, Read, Write, Written


def read_state(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Of each tensor, as torch's optimizer keeps it; nothing before its first update."""
    trainer.wait()
    layout, spec = trainer.layout, trainer.spec
    parts = state_names(spec)
    if not parts:
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
        seen = updates[layout.blocks_of(index)[0]]
        if not seen:
            states.append({})
            continue
        state = {part: flat[part][offset : offset + tensor.elements].view(tensor.shape).clone() for part in parts}
        if spec.optimizer != "sgd":
            state = {"step": torch.tensor(float(seen)), **state}
        states.append(state)
    return states


def write_state(trainer: Trainer, states: Sequence[Mapping[str, Any]]) -> None:
    """The job goes on from these states, one for each tensor, and from the lowest rank's parameters. All workers call
    it between the same two steps; it returns when no failure can lose what was loaded. Raises ValueError if a state has
    not what the optimizer needs.
    """
    trainer.wait()
    parts = state_names(trainer.spec)
    lacking = {part for state in states for part in parts if state.get(part) is None}
    if lacking and any(states):
        raise ValueError(f"the state has no {', '.join(sorted(lacking))} of some parameters")
    trainer.load()
    session, layout = trainer.session, trainer.layout
    progress = session.progress
    parameters = [bytearray(session.parameters.bytes_of(block)) for block in layout.blocks]  # a rollback changes those
    number, epoch, step, brought = progress.loads.begun + 1, 0, 0, 0

    def due() -> bool:
        nonlocal epoch, step
        epoch, step = progress.epoch, progress.step
        if progress.loads.done >= number and progress.ready:
            epoch = 0
            return True
        return progress.loads.brings and progress.loads.begun == number and epoch != brought

    session.want_load(number)
    try:
        session.wait(due)
        while epoch:
            brought = epoch
            _bring(trainer, states, parameters, epoch, step)
            session.say_load()
            session.wait(due)
    finally:
        session.want_load(0)
    trainer.take_loaded()


def _bring(
    trainer: Trainer, states: Sequence[Mapping[str, Any]], parameters: Sequence[bytearray], epoch: int, step: int
) -> None:
    """Returns when all is written, or belongs to an older epoch."""
    layout, spec, session = trainer.layout, trainer.spec, trainer.session
    parts = state_names(spec)
    updates = [int(state.get("step", 1 if state else 0)) for state in states]  # SGD does not count them
    flat = {part: torch.zeros(layout.elements) for part in parts}
    for state, tensor, offset in zip(states, layout.tensors, layout.offsets, strict=True):
        for part in parts if state else ():
            flat[part][offset : offset + tensor.elements].copy_(state[part].reshape(-1))
    progress = session.progress
    answers = _Answers(trainer, (1 + len(parts)) * len(layout.blocks))
    for block, contents in zip(layout.blocks, parameters, strict=True):
        seen = updates[block.pieces[0].tensor]
        for part in parts:
            message = Write(spec.job, epoch, block.index, part, step, False)
            session.ask(message, _bytes_of(flat[part], block), answers.one)
        last = Write(spec.job, epoch, block.index, PARAMETERS, step, True, seen)
        session.ask(last, memoryview(contents), answers.one)
    session.wait(lambda: (answers.all_there and progress.ready) or progress.epoch != epoch)


class _Answers:
    """Counts answers, which come in the loop's thread."""

    def __init__(self, trainer: Trainer, awaited: int) -> None:
        self._session = trainer.session
        self._left = awaited

    def one(self, _: object = None) -> None:
        self._left -= 1

    @property
    def all_there(self) -> bool:
        return self._left <= 0

    def wait(self) -> None:
        self._session.wait(lambda: self.all_there)


def _bytes_of(flat: Tensor, block: Block) -> memoryview:
    elements: Any = flat[block.start : block.start + block.elements].numpy()
    return memoryview(elements).cast("B")
