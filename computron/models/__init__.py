"""Checkpoints become parameter images, and address ranges become modules.

`plan_model` reads what a model is; its image goes to the host store; `load_model` binds a module to an address range.
"""

from computron.memory.gate import Gate, OpenGate
from computron.models.custom import BatchManager, StackTensors
from computron.models.embedding import EmbeddingSettings
from computron.models.geometry import CacheGeometry
from computron.models.layout import TensorSlot
from computron.models.loading import LoadedModel, load_model
from computron.models.plan import ModelPlan, plan_model
from computron.models.shard import Communicator, Shard

__all__ = [
    "BatchManager",
    "CacheGeometry",
    "Communicator",
    "EmbeddingSettings",
    "Gate",
    "LoadedModel",
    "ModelPlan",
    "OpenGate",
    "Shard",
    "StackTensors",
    "TensorSlot",
    "load_model",
    "plan_model",
]
