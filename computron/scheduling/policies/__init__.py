"""The policies that a server can be told to use, by name."""

from __future__ import annotations

from collections.abc import Callable

from computron.scheduling.policies.default import Default
from computron.scheduling.policies.lru import Lru
from computron.scheduling.policies.policy import Policy

POLICIES: dict[str, Callable[[], Policy]] = {"default": Default, "lru": Lru}
