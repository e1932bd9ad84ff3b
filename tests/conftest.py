"""What every part's tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Before torch is imported: its threads shall sleep, not spin, while they wait for each other, or tests crawl on a
# machine whose cores are busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from computron.errors import CheckpointError
from computron.models.demo import DemoModels, demo_models


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that a test runs in this process set up logging for good, on a stream that ends with the test."""
    root, ours = logging.getLogger(), logging.getLogger("computron")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    switches = logging.logThreads, logging.logProcesses, logging.logMultiprocessing, logging._srcfile
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.logThreads, logging.logProcesses, logging.logMultiprocessing, logging._srcfile = switches


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
