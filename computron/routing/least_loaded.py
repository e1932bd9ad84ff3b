"""The group with the fewest requests, wherever models are."""

from __future__ import annotations

from collections.abc import Sequence

from computron.routing.fleet import Fleet, GroupView, ModelFacts


class LeastLoaded:
    """What a load balancer that knows nothing of models does. Ties go to the lowest number."""

    def choose(self, model: ModelFacts, groups: Sequence[GroupView], fleet: Fleet, now: float) -> int:
        return min(groups, key=_outstanding).number


def _outstanding(group: GroupView) -> int:
    return group.outstanding
