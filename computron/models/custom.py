"""Custom models: any module that a factory gives, and a batch manager that speaks JSON for it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from computron.config import ModelConfig
from computron.errors import BadRequest, ConfigError
from computron.models.checkpoint import DTYPES
from computron.models.shard import WHOLE, Communicator, Shard


class BatchManager(Protocol):
    """Made once a model, as `manager(module)`. Called from several threads, never on two batches of a model at once:
    those of one step have been split before those of the next one are made.
    """

    def parse(self, body: Any) -> Any:
        """One request's payload from its JSON body, on the CPU. Raises BadRequest if it cannot be served."""

    def group(self, payload: Any) -> Hashable:
        """Payloads of equal groups may share a batch."""

    def make_batch(self, payloads: Sequence[Any]) -> tuple[Any, ...]:
        """The module's positional arguments. Tensors are moved to the model's device afterwards."""

    def split_batch(self, output: Any, count: int) -> Sequence[Any]:
        """`count` values that can be encoded as JSON, one for each payload in order."""


class StackTensors:
    """The batch manager of models without one: {"input": numbers} in, the module's output for that input out.

    Inputs become tensors of the module's floating dtype (of int64 if it has none and all numbers are whole), stacked
    along a new first dimension; inputs of different shapes go to different batches. Derive from it to change a part.
    """

    def __init__(self, module: nn.Module) -> None:
        floats = (tensor.dtype for tensor in module.parameters() if tensor.dtype.is_floating_point)
        self._dtype = next(floats, None)

    def parse(self, body: Any) -> Any:
        if not isinstance(body, Mapping) or "input" not in body:
            raise BadRequest('the body must be a JSON object with "input"', param="input")
        try:
            tensor = torch.tensor(body["input"])
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise BadRequest(f"input must be a number or nested lists of numbers: {error}", param="input") from error
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def group(self, payload: Any) -> Hashable:
        return tuple(payload.shape), payload.dtype

    def make_batch(self, payloads: Sequence[Any]) -> tuple[Any, ...]:
        return (torch.stack(list(payloads)),)

    def split_batch(self, output: Any, count: int) -> Sequence[Any]:
        return [_row(output, index) for index in range(count)]


def make_module(model: ModelConfig, shard: Shard = WHOLE) -> nn.Module:
    """What the model's factory gives, in evaluation mode and in the configured dtype; a factory that takes `shard`
    gives that part.

    The random generator is seeded before the call, so that a factory that draws weights gives the same each time.
    Raises ConfigError if there is no such factory, it raises, it gives something else than a module, or the model is
    to be split and it takes no `shard`.
    """
    if model.factory is None:
        raise ConfigError(f'model "{model.id}": a custom model needs factory = "package.module:function"')
    factory = import_object(model.factory, f'model "{model.id}": factory')
    arguments = dict(model.arguments)
    if _takes_shard(factory):
        arguments["shard"] = shard
    elif not shard.whole:
        raise ConfigError(
            f'model "{model.id}": its factory {model.factory} takes no keyword argument "shard", so the model cannot '
            f"be split over {shard.world} nodes; let it take shard and give that part, or set tensor_parallel and "
            "pipeline_parallel to 1"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        try:
            module = factory(**arguments)
        except Exception as error:
            raise ConfigError(f'model "{model.id}": its factory {model.factory} raised {error!r}') from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f'model "{model.id}": its factory {model.factory} gave a {type(module).__name__}, not a torch.nn.Module'
        )
    if model.dtype != "auto":
        module.to(DTYPES[model.dtype])
    nn.Module.eval(module)
    return module.requires_grad_(False)


def give_communicator(module: nn.Module, communicator: Communicator) -> None:
    """To a module that asks for one: it has a method `set_communicator`."""
    setter: Any = getattr(module, "set_communicator", None)
    if callable(setter):
        setter(communicator)


def make_batch_manager(model: ModelConfig, module: nn.Module) -> BatchManager:
    """The model's batch manager. Raises ConfigError if it cannot be made or lacks a method."""
    if model.batch_manager is None:
        return StackTensors(module)
    where = f'model "{model.id}": batch_manager'
    try:
        manager = import_object(model.batch_manager, where)(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{where} {model.batch_manager} raised {error!r}") from error
    lacking = [name for name in ("parse", "group", "make_batch", "split_batch") if not hasattr(manager, name)]
    if lacking:
        raise ConfigError(f"{where} {model.batch_manager} has no method {lacking[0]}")
    return cast(BatchManager, manager)


def import_object(path: str, where: str) -> Any:
    """What "package.module:name" names; modules in the working directory are found too. Raises ConfigError."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f'{where} must be "package.module:name", not "{path}"')
    if "" not in sys.path:
        sys.path.append("")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{where} "{path}": there is no module {error.name}; install its package, or start the server where it lies'
        ) from error
    except AttributeError as error:
        raise ConfigError(f'{where} "{path}": module {module_name} has no {name}') from error
    except Exception as error:
        raise ConfigError(f'{where} "{path}": importing {module_name} raised {error!r}') from error


def _takes_shard(factory: Any) -> bool:
    try:
        parameter = inspect.signature(factory).parameters.get("shard")
    except (TypeError, ValueError):  # callables that are not written in Python
        return False
    return parameter is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY


def _row(output: Any, index: int) -> Any:
    if isinstance(output, torch.Tensor):
        return output[index].tolist()
    if isinstance(output, Mapping):
        return {name: _row(value, index) for name, value in output.items()}
    return [_row(value, index) for value in output]
