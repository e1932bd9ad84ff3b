"""What every part's tests share."""

from __future__ import annotations

import os

# Before torch is imported: its threads shall sleep, not spin, while they wait for each other, or tests crawl on a
# machine whose cores are busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes seconds comes after what takes milliseconds."""
    slow = ("group", "end_to_end")  # they start processes
    items.sort(key=lambda item: max((slow.index(part) + 1 for part in item.path.parts if part in slow), default=0))
