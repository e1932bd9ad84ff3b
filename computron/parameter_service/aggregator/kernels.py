"""What is done to a block at a step: gradients of all workers are summed, and torch's fused kernel is applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from computron.parameter_service.layout import Block
from computron.parameter_service.specs import PARAMETERS
from computron.parameter_service.wire.messages import Hyperparameters, JobSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Summer:
    """Adds gradients up in the order of ranks, in memory of its own. It belongs to one thread."""

    def __init__(self) -> None:
        self._sum = torch.empty(0)
        self._part = torch.empty(0)

    def sum(self, gradients: Sequence[Tensor], scales: Sequence[float], *, average: bool) -> Tensor:
        """fp32, as long as each of `gradients`, which are flat and of one dtype; valid until the next call.

        Each is multiplied with its scale before, and the sum divided by their number if `average`.
        """
        elements = len(gradients[0])
        if len(self._sum) < elements:
            self._sum, self._part = torch.empty(elements), torch.empty(elements)
        total, part = self._sum[:elements], self._part[:elements]
        first = _scaled(gradients[0], scales[0], total)
        if len(gradients) == 1:
            return first
        torch.add(first, _scaled(gradients[1], scales[1], part), out=total)
        for gradient, scale in zip(gradients[2:], scales[2:], strict=True):
            total.add_(_scaled(gradient, scale, part))
        return total.div_(len(gradients)) if average else total


def _scaled(gradient: Tensor, scale: float, into: Tensor) -> Tensor:
    if gradient.dtype == torch.float32 and scale == 1.0:
        return gradient
    into.copy_(gradient)
    return into if scale == 1.0 else into.mul_(scale)


class Kernel:
    """One block's parameters and state, cut into views of the tensors in it. It changes them in place.

    Vectorised kernels round the last elements of a tensor, which fill no vector, differently: each tensor's pieces are
    therefore passed as they would be if they were not in a block.
    """

    def __init__(self, spec: JobSpec, block: Block, parts: Mapping[str, Tensor]) -> None:
        """parts: flat fp32 tensors of the block's length: PARAMETERS and each of `state_names`."""
        self._spec = spec
        self._sizes: list[int] = []  # of each piece, and of the gap behind it
        following = [*(piece.offset for piece in block.pieces[1:]), block.elements]
        for piece, end in zip(block.pieces, following, strict=True):
            self._sizes += [piece.count, end - piece.offset - piece.count]
        self._views = {name: self._cut(part) for name, part in parts.items()}
        self._step = torch.zeros(())
        kernels: Mapping[str, Callable[[list[Tensor], Hyperparameters, int], None]] = {
            "sum": self._sum, "sgd": self._sgd, "adam": self._adam, "adamw": self._adam,
        }  # fmt: skip
        self._kernel = kernels[spec.optimizer]

    def apply(self, gradient: Tensor, hyperparameters: Hyperparameters, step: int) -> None:
        """gradient: fp32, of the block's length. step: from 1 on."""
        self._kernel(self._cut(gradient), hyperparameters, step)

    def _cut(self, flat: Tensor) -> list[Tensor]:
        return list(flat.split_with_sizes(self._sizes)[::2])

    def _sum(self, gradients: list[Tensor], hyper: Hyperparameters, step: int) -> None:
        for parameters, gradient in zip(self._views[PARAMETERS], gradients, strict=True):
            parameters.copy_(gradient)

    def _sgd(self, gradients: list[Tensor], hyper: Hyperparameters, step: int) -> None:
        torch._fused_sgd_(
            self._views[PARAMETERS],
            gradients,
            self._views["momentum_buffer"] if self._spec.momentum else [],
            weight_decay=hyper.weight_decay,
            momentum=hyper.momentum,
            lr=hyper.lr,
            dampening=hyper.dampening,
            nesterov=hyper.nesterov,
            maximize=hyper.maximize,
            is_first_step=step == 1,
        )

    def _adam(self, gradients: list[Tensor], hyper: Hyperparameters, step: int) -> None:
        fused = torch._fused_adamw_ if self._spec.optimizer == "adamw" else torch._fused_adam_
        self._step.fill_(step)
        fused(
            self._views[PARAMETERS],
            gradients,
            self._views["exp_avg"],
            self._views["exp_avg_sq"],
            self._views["max_exp_avg_sq"] if self._spec.amsgrad else [],
            [self._step] * len(gradients),
            lr=hyper.lr,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            amsgrad=self._spec.amsgrad,
            maximize=hyper.maximize,
        )
