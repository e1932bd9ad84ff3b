"""The next forward begins before the last step is through: each module waits for its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from computron.parameter_service.agent.training import Trainer


def overlap(trainer: Trainer, model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """From now on `trainer.step` does not wait. A module that uses parameters of another one, without calling it, must
    not be used this way.
    """
    places = {id(parameter): index for index, parameter in enumerate(parameters)}
    for module in model.modules():
        tensors = [places[id(p)] for p in module.parameters(recurse=False) if id(p) in places]
        if tensors:
            blocks = sorted({block for tensor in tensors for block in trainer.layout.blocks_of(tensor)})
            module.register_forward_pre_hook(_waiter(trainer, tensors, blocks))
    for module in model.modules():
        register: Any = module.register_state_dict_pre_hook
        register(lambda *_: trainer.wait())
    trainer.overlapping = True


def _waiter(trainer: Trainer, tensors: list[int], blocks: list[int]) -> Callable[[nn.Module, Any], None]:
    def wait(module: nn.Module, inputs: Any) -> None:
        trainer.wait_for(tensors, blocks)

    return wait
