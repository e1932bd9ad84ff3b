"""What a system does around its scheduler that Computron does not do, and the events that tell its scheduler so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EvictionFinished:
    """The model's evicted pages have been copied back to the host."""

    model: str


@dataclass(frozen=True, slots=True)
class FirstStageEnded:
    """The first stage has computed its part of this model's step and takes the next message."""

    model: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """write_back: evicted pages are copied back over the link; `EvictionFinished` follows.

    steps_behind_copies: a step's inputs travel on the copy engine that swap-ins use, behind those ordered before it.
    tells_first_stage: `FirstStageEnded` is told.
    """

    write_back: bool = False
    steps_behind_copies: bool = False
    tells_first_stage: bool = False
