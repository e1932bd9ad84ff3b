"""What a system does around its scheduler that Computron does not do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Surroundings:
    """write_back: evicted pages are copied back over the link.

    steps_behind_copies: a step's inputs travel on the copy engine that swap-ins use, behind those ordered before it.
    silent_stages: nobody says when the first stage of a pipeline is done with a step: a model has one at a time.
    """

    write_back: bool = False
    steps_behind_copies: bool = False
    silent_stages: bool = False
