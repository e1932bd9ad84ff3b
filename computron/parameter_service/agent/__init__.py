"""What runs in a training process: optimizers whose steps the aggregators take."""

from computron.parameter_service.agent.ddp import ddp_hook
from computron.parameter_service.agent.optimizers import SGD, Adam, AdamW
from computron.parameter_service.agent.settings import ParameterService

__all__ = ["SGD", "Adam", "AdamW", "ParameterService", "ddp_hook"]
