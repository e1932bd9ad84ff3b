"""A model without weights that gives back what it is sent. Serve it from the repository's root:

    source .venv/bin/activate
    computron serve examples/echo.toml
    curl -s localhost:8000/v1/models/echo/infer -H 'Content-Type: application/json' -d '{"any": ["JSON", 1]}'

It shows the whole of a batch manager, and what a request costs that computes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn


class Echo(nn.Module):
    def forward(self, payloads: list[Any]) -> list[Any]:
        return payloads


class EchoBatches:
    """Every method of a batch manager, doing as little as it may."""

    def __init__(self, module: nn.Module) -> None:
        pass

    def parse(self, body: Any) -> Any:
        """Any JSON value is good."""
        return body

    def group(self, payload: Any) -> Hashable:
        """Any two requests may share a batch."""
        return None

    def make_batch(self, payloads: Sequence[Any]) -> tuple[Any, ...]:
        return (list(payloads),)

    def split_batch(self, output: Any, count: int) -> Sequence[Any]:
        return list(output)


def make() -> nn.Module:
    return Echo()
