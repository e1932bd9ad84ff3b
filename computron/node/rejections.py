"""Why a request is turned away, in words for the client."""

from __future__ import annotations

from computron.errors import (
    ComputronError,
    ContextTooLong,
    DeadlineExceeded,
    ModelNotFound,
    QueueFull,
    SwapFailed,
    Unavailable,
)
from computron.node.snapshot import NodeState
from computron.scheduling.actions import Reject, RejectReason

RETRY_AFTER = 1.0  # seconds a client is told to wait where nothing better is known


def rejection(action: Reject, swap_error: str | None) -> ComputronError:
    """The error that the request's reader gets. `swap_error`: the words of the model's last failed swap-in."""
    model = action.model
    match action.reason:
        case RejectReason.QUEUE_FULL:
            return QueueFull(f"the queue of model {model!r} is full; try again later", retry_after=RETRY_AFTER)
        case RejectReason.TOO_LARGE:
            return ContextTooLong(
                f"the request's KV cache does not fit the device beside model {model!r}: shorten the prompt or "
                "max_tokens, or raise device.memory"
            )
        case RejectReason.DEADLINE:
            return DeadlineExceeded("the request's deadline passed before it could be started")
        case RejectReason.SWAP_FAILED:
            return SwapFailed(
                f"model {model!r} could not be brought to the device: {swap_error}; try again later",
                retry_after=RETRY_AFTER,
            )
        case RejectReason.UNKNOWN_MODEL:
            return ModelNotFound(f"The model `{model}` does not exist.", param="model")


def unavailable(state: NodeState, why: str, failure: str | None, recovery: float) -> Unavailable:
    """The error of requests that a node takes none of in this state. `why`: it is not ready; `failure`: it has failed;
    `recovery`: seconds until a lost node may be back.
    """
    wait = RETRY_AFTER
    match state:
        case NodeState.STARTING:
            words = f"the server is starting: {why}"
        case NodeState.RECOVERING:
            words, wait = f"the group lost a node and is being formed anew: {why}", recovery
        case NodeState.FAILED:
            words = f"the server has failed and must be restarted: {failure}"
        case _:
            words = "the server is shutting down"
    return Unavailable(words, retry_after=wait)
