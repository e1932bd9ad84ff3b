"""Swappers are tested on the host and on CUDA's own code over the stand-in driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from computron import _transfer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def standin() -> str:
    """The library that stands in for the CUDA driver."""
    command = [sys.executable, "setup.py", "-q", "build_standin"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.fixture(params=["host", "cuda over the stand-in driver"])
def backend(request) -> _transfer.Backend:
    if request.param == "host":
        return _transfer.host_backend()
    return _transfer.cuda_backend(library=request.getfixturevalue("standin"))


@pytest.fixture
def slow():
    """A backend whose link takes 16 ms for a page, so that a swap is under way for a while."""
    return _transfer.host_backend(link_bandwidth=4e6)
