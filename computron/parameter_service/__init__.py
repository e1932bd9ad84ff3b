"""Shared, elastic aggregation for many training jobs: aggregators sum gradients and run the optimizers of all of them.

In a training script: `from computron.parameter_service import AdamW` in place of torch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from computron.parameter_service.agent.ddp import ddp_hook
    from computron.parameter_service.agent.optimizers import SGD, Adam, AdamW
    from computron.parameter_service.agent.settings import ParameterService

__all__ = ["SGD", "Adam", "AdamW", "ParameterService", "ddp_hook"]


def __getattr__(name: str) -> Any:
    """What runs in training processes is imported when it is used: the master does without torch."""
    if name not in __all__:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: the optimizers are SGD, Adam and AdamW; "
            "for any other, ddp_hook averages the gradients"
        )
    from computron.parameter_service import agent

    return getattr(agent, name)
