"""What the API needs of a node and its models; anything of this shape can be served."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from computron.config import ModelConfig
from computron.execution.requests import Job
from computron.node.handle import RequestHandle
from computron.node.progress import Progress
from computron.node.snapshot import NodeSnapshot


class GenerationDefaults(Protocol):
    """What the checkpoint says about sampling, for requests that do not say otherwise. None: no opinion."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def max_tokens(self) -> int | None: ...


class BatchManager(Protocol):
    def parse(self, body: Any) -> Any:
        """A request's payload from its JSON body. Raises BadRequest."""


class LoadedModel(Protocol):
    """What turns requests into tokens, pixels or payloads. Methods may be called from several threads at once."""

    @property
    def batch_manager(self) -> BatchManager:
        """custom"""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Raises BadRequest for an id outside the vocabulary."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The prompt's text, special tokens included. Raises BadRequest."""

    def pixels(self, data: bytes) -> Any:
        """An image file's bytes as the tensor that the model takes. Raises BadRequest if they are no image."""


class ModelPlan(Protocol):
    @property
    def config(self) -> ModelConfig: ...
    @property
    def max_model_len(self) -> int:
        """Tokens that the model was made for; 0 for models that read no text."""

    @property
    def generation(self) -> GenerationDefaults: ...

    @property
    def labels(self) -> Sequence[str]:
        """classify: the name of each class."""

    @property
    def takes_images(self) -> bool: ...


class Executor(Protocol):
    @property
    def max_len(self) -> int:
        """Tokens of prompt and answer together that the device can serve; 0 for models that do not generate."""


class ServedModel(Protocol):
    @property
    def plan(self) -> ModelPlan: ...
    @property
    def loaded(self) -> LoadedModel: ...
    @property
    def executor(self) -> Executor: ...


def context_length(served: ServedModel) -> int:
    """Tokens that the model takes here, prompt and answer together; 0 for models that read no text."""
    return served.executor.max_len or served.plan.max_model_len


class ServingNode(Protocol):
    """All methods belong to the event loop's thread."""

    ended: asyncio.Event
    """Set when the node has come to its end by itself."""

    @property
    def ready(self) -> bool: ...

    def model(self, model: str) -> ServedModel:
        """Raises ModelNotFound, or Unavailable while models cannot be used."""

    def submit(
        self, model: str, job: Job, *, request_id: str, priority: int = 0, deadline: float | None = None
    ) -> RequestHandle:
        """`deadline`: seconds from now. Raises any ComputronError; later ones come from the handle's iteration."""

    def load(self, model: str) -> None: ...

    def unload(self, model: str) -> None: ...

    def snapshot(self) -> NodeSnapshot: ...

    async def startup(self, progress: Progress | None = None) -> None: ...

    async def shutdown(self, drain: float) -> None: ...

    async def leave(self) -> None:
        """The process will end at once, without `shutdown`."""
