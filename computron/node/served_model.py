"""A model that is served: what requests see of it, and what the scheduler knows."""

from __future__ import annotations

from dataclasses import dataclass

from computron.config import SchedulerConfig
from computron.execution.protocols import Executor
from computron.models.loading import LoadedModel
from computron.models.plan import ModelPlan
from computron.node.agreement import GroupModel
from computron.scheduling.events import ModelSpec


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as requests see it. `loaded`: the leader's shard of it; `held`: what the group holds."""

    plan: ModelPlan
    loaded: LoadedModel
    executor: Executor
    held: GroupModel


def model_spec(served: ServedModel, scheduler: SchedulerConfig) -> ModelSpec:
    """The model as the scheduler knows it."""
    config = served.plan.config
    return ModelSpec(
        model=config.id,
        pages=served.held.pages,
        segments=(len(served.held.pages),),
        max_batch_size=config.max_batch_size,
        max_queue=scheduler.max_queue if config.max_queue is None else config.max_queue,
        pinned=config.pinned,
        continuous=config.task == "generate",
        blocks_per_frame=served.executor.blocks_per_frame,
    )
