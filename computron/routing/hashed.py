"""Every model has one home, whatever the load."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from computron.routing.fleet import Fleet, GroupView, ModelFacts


class Hashed:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): if a group is lost, only its own models move."""

    def choose(self, model: ModelFacts, groups: Sequence[GroupView], fleet: Fleet, now: float) -> int:
        return max(groups, key=lambda group: score(model.name, group.number)).number


def score(model: str, group: int) -> bytes:
    return blake2b(f"{group}/{model}".encode(), digest_size=8).digest()
