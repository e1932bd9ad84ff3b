"""torch's optimizers, run by the Parameter Service: the parameters and the state live with its aggregators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from computron.parameter_service.agent.overlap import overlap
from computron.parameter_service.agent.parameters import trained
from computron.parameter_service.agent.settings import ParameterService
from computron.parameter_service.agent.state import read_state, write_state
from computron.parameter_service.agent.training import Rollback, Trainer
from computron.parameter_service.layout import TensorSpec
from computron.parameter_service.versions.names import check_version
from computron.parameter_service.wire.messages import Hyperparameters, JobSpec

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm
WITHOUT_MEANING: dict[str, Any] = {
    "foreach": None, "fused": None, "capturable": False, "differentiable": False,
}  # fmt: skip


class ServiceOptimizer(torch.optim.Optimizer):
    """What they share. `step` leaves the parameters as all workers' gradients together make them.

    A parameter that is fp32, contiguous and in host memory becomes a view of the job's own memory. Differences to
    torch: all workers call `step` equally often; a gradient that is missing is an error, or zero
    (find_unused_parameters), which unlike torch's skipping still decays weights and moments; groups cannot be added
    later.
    """

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], service: ParameterService | None, kind: str, **of_job: bool
    ) -> None:
        self._trainer: Trainer | None = None
        super().__init__(params, defaults)
        self._step_supports_amp_scaling = True
        service = service or ParameterService.from_environment()
        self._parameters = trained(p for group in self.param_groups for p in group["params"])
        names = {id(p): name for name, p in self._named()}
        groups = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        tensors = tuple(_spec(names[id(p)], p, groups[id(p)]) for p in self._parameters)
        extras = {name: p for name, p in self._named() if not p.requires_grad} | service.extra_tensors()
        spec = JobSpec(
            service.job, tensors, kind, service.block_elements,
            tuple(_spec(name, extra, 0) for name, extra in extras.items()), service.gradients, service.average,
            snapshot_every=service.snapshot_every, loss_limit=service.loss_limit, workers=service.workers,
            min_workers=service.min_workers, **of_job,
        )  # fmt: skip
        self._clip = 1.0
        self._version: str | None = None
        self._trainer = Trainer(service, spec, self._parameters, extras)

    @property
    def trainer(self) -> Trainer:
        assert self._trainer is not None
        return self._trainer

    @property
    def steps(self) -> int:
        """That the job has done."""
        return self.trainer.steps

    @property
    def lost_steps(self) -> int:
        """That were taken back after failures."""
        return self.trainer.lost_steps

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part now."""
        return self.trainer.members

    @property
    def on_rollback(self) -> Rollback | None:
        """Called in the training thread with the step from which the job goes on and the number of steps lost."""
        return self.trainer.on_rollback

    @on_rollback.setter
    def on_rollback(self, callback: Rollback | None) -> None:
        self.trainer.on_rollback = callback

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Raises ParameterServiceError; ValueError where a parameter has no gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        overflowed = getattr(self, "found_inf", None)  # set by torch.amp.GradScaler
        skip = overflowed is not None and bool(overflowed.item())
        groups = tuple(self._hyperparameters(group) for group in self.param_groups)
        clip, self._clip = self._clip, 1.0
        version, self._version = self._version, None
        self.trainer.step(groups, scale=clip * self._unscale(), skip=skip, version=version)
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradient that the next `step` applies down to this Euclidean norm, if it is longer. Returns its
        norm before. It is the norm of what all workers' gradients add up to, so all of them call this; their own
        gradients stay as they are.
        """
        total = self.trainer.norm(self._unscale())
        self._clip = min(1.0, max_norm / (total + EPSILON))
        return torch.tensor(total)

    def publish(self, name: str) -> None:
        """The parameters after the next `step` become a version of this name. All workers call it; tensors that are not
        trained are those of the lowest rank, as they are when `step` is called. If that step is rolled back before the
        version is complete, there is none. Raises BadRequest for a name that a file cannot have.
        """
        check_version(name)
        self._version = name

    def overlap(self, model: nn.Module) -> None:
        """From now on `step` returns when the gradients are on their way, and each module of `model` waits for its own
        parameters when it is called next.
        """
        overlap(self.trainer, model, self._parameters)

    def wait(self) -> None:
        """Until the parameters are those after the last `step`: only after `overlap`, before they are read directly."""
        self.trainer.wait()

    def close(self) -> None:
        """Leave the job. The parameters keep their values."""
        if self._trainer is not None:
            self._trainer.close("the optimizer was closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._trainer is not None:
            raise RuntimeError(
                "a job of the Parameter Service cannot get more parameters: pass all groups at the start"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizer of this name gives it. All workers must be between the same two steps."""
        with self._with_state(read_state(self.trainer)):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of torch's optimizer of this name or of this one. All members call it between the same two steps, or it does
        not return; the lowest rank's parameters and state become the job's, which a failure does not take back.
        """
        super().load_state_dict({**state_dict, "state": {}})
        places = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        states = [state_dict["state"].get(places[id(p)], {}) for p in self._parameters]
        write_state(self.trainer, states)

    @contextmanager
    def _with_state(self, states: list[dict[str, Tensor]]) -> Iterator[None]:
        for parameter, state in zip(self._parameters, states, strict=True):
            if state:
                self.state[parameter] = state
        try:
            yield
        finally:
            self.state.clear()

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
            yield from zip(names, group["params"], strict=True)

    def _unscale(self) -> float:
        scale = getattr(self, "grad_scale", None)  # set by torch.amp.GradScaler
        return 1.0 if scale is None else 1.0 / float(scale.item())

    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        raise NotImplementedError


class SGD(ServiceOptimizer):
    """torch.optim.SGD, run by the Parameter Service."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        service: ParameterService | None = None,
        **others: Any,
    ) -> None:
        """service: None for what the environment says. Raises TypeError, ValueError, ParameterServiceError."""
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, **_without_meaning(others, "capturable"),
        )  # fmt: skip
        torch.optim.SGD([torch.empty(1)], **defaults)  # raises what torch raises
        super().__init__(params, defaults, service, "sgd", momentum=momentum != 0.0)

    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        return Hyperparameters(
            float(group["lr"]), group["weight_decay"], momentum=group["momentum"], dampening=group["dampening"],
            nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip


class _Adam(ServiceOptimizer):
    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        first, second = group["betas"]
        return Hyperparameters(
            float(group["lr"]), group["weight_decay"], (float(first), float(second)), group["eps"],
            maximize=group["maximize"],
        )  # fmt: skip


class Adam(_Adam):
    """torch.optim.Adam, run by the Parameter Service."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        service: ParameterService | None = None,
        **others: Any,
    ) -> None:
        """service: None for what the environment says. Raises TypeError, ValueError, ParameterServiceError."""
        defaults = _adam(lr, betas, eps, weight_decay, amsgrad, maximize, others)
        torch.optim.Adam([torch.empty(1)], **defaults)
        super().__init__(params, defaults, service, "adam", amsgrad=amsgrad)


class AdamW(_Adam):
    """torch.optim.AdamW, run by the Parameter Service."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        service: ParameterService | None = None,
        **others: Any,
    ) -> None:
        """service: None for what the environment says. Raises TypeError, ValueError, ParameterServiceError."""
        defaults = _adam(lr, betas, eps, weight_decay, amsgrad, maximize, others)
        torch.optim.AdamW([torch.empty(1)], **defaults)
        super().__init__(params, defaults, service, "adamw", amsgrad=amsgrad)


def _adam(
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    others: dict[str, Any],
) -> dict[str, Any]:
    return dict(
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
        **_without_meaning(others),
    )  # fmt: skip


def _without_meaning(others: dict[str, Any], *unknown: str) -> dict[str, Any]:
    """torch's arguments that say how it computes, at their defaults. Raises TypeError if one is at another value."""
    known = {name: value for name, value in WITHOUT_MEANING.items() if name not in unknown}
    for name, value in others.items():
        if name not in known:
            raise TypeError(f"unknown argument {name}")
        if value != known[name]:
            raise TypeError(f"{name}={value!r} has no meaning here: the aggregators compute with torch's fused kernels")
    return known


def _spec(name: str, tensor: Tensor, group: int) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), group)
