"""Every error that Computron raises on purpose, in one tree, each with the HTTP status it becomes."""

from __future__ import annotations

from typing import ClassVar


class ComputronError(Exception):
    """Base of all errors. `status`, `type` and `code` are what the HTTP answer carries, `exit_code` what a command that
    fails with it ends with.
    """

    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class ConfigError(ComputronError):
    """The configuration file is wrong. The message names the file, the line and the remedy."""

    code = "invalid_config"


class CheckpointError(ComputronError):
    """A checkpoint is missing, truncated, corrupt, or does not fit its architecture."""

    code = "invalid_checkpoint"


class BadRequest(ComputronError):
    """The client sent something that cannot be served as it is."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextTooLong(BadRequest):
    """The prompt, or the prompt with the answer asked for, exceeds what the model can take, or what its cache can ever
    hold on this device: trying again does not help.
    """

    code = "context_length_exceeded"


class PayloadTooLarge(BadRequest):
    """The body of the request is larger than the server takes."""

    status = 413
    code = "request_too_large"


class Unauthorized(ComputronError):
    """The API key is missing or wrong."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFound(ComputronError):
    """No model of that id is served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class ClientLimitExceeded(ComputronError):
    """This client has too many requests open."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QueueFull(ComputronError):
    """The model's queue is full; try again later."""

    status = 503
    type = "overloaded_error"
    code = "queue_full"


class DeadlineExceeded(ComputronError):
    """The request's own deadline passed before it could be answered."""

    status = 503
    type = "timeout_error"
    code = "deadline_exceeded"


class Unavailable(ComputronError):
    """The server cannot take or finish this request now: it is starting, draining, or its group is down."""

    status = 503
    type = "service_unavailable_error"
    code = "service_unavailable"


class GroupBroken(ComputronError):
    """The nodes of the group lost each other: what they computed together came to nothing."""

    status = 503
    type = "service_unavailable_error"
    code = "group_broken"


class StepLost(GroupBroken):
    """Another step failed in a way that broke the group. Nothing speaks against the requests of this one."""


class OutOfMemory(ComputronError):
    """Something does not fit the device's or the host's budget now. The message gives both numbers."""

    status = 503
    code = "out_of_memory"


class SwapFailed(ComputronError):
    """A transfer to the device failed, with the backend's words."""

    status = 503
    code = "swap_failed"


class StorageFailed(ComputronError):
    """A file could not be written. The message names it and the remedy: room on the disk, a folder's permissions."""

    status = 507
    code = "storage_failed"


class ExecutionFailed(ComputronError):
    """The model's own code raised during a run."""

    code = "execution_failed"


class ParameterServiceError(ComputronError):
    """A training job cannot go on with the Parameter Service. The message says why."""

    status = 503
    type = "service_unavailable_error"
    code = "parameter_service_error"


class JobRefused(ParameterServiceError):
    """The Parameter Service does not let this worker take part: another job, another secret, or too large."""

    status = 409
    type = "invalid_request_error"
    code = "job_refused"
