"""What every part's tests share."""

from __future__ import annotations

import pytest

from computron.errors import CheckpointError
from computron.models.demo import DemoModels, demo_models


@pytest.fixture(scope="session")
def demo() -> DemoModels:
    """The real models. `make test` fetches them before it starts the tests."""
    try:
        return demo_models()
    except CheckpointError as error:
        pytest.skip(f"the real models cannot be fetched: {error}")
