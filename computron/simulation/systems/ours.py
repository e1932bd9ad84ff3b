"""Computron with each of its policies."""

from __future__ import annotations

from computron.scheduling.policies import POLICIES
from computron.simulation.systems.system import System


def _with(policy: str) -> System:
    return System(policy, lambda setup: setup.scheduler(policy))


OURS = tuple(_with(policy) for policy in POLICIES)
