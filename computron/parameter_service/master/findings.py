"""What aggregators have said: where blocks are, what was committed, what is missing, and who has said nothing."""

from __future__ import annotations

from computron.parameter_service.master.state import Change, Job, State
from computron.parameter_service.wire.messages import Held, HeldCommit


def silent(state: State, job: Job, change: Change) -> dict[str, tuple[tuple[int, str], ...]]:
    """Aggregators that may be alive in an old epoch, with the members of that epoch."""
    assert job.book.placed is not None
    members = job.book.placed.members
    suspects = {**dict.fromkeys(job.holders, members), **job.unfenced}
    return {name: who for name, who in suspects.items() if name in state.aggregators and name not in change.held}


def is_followed(job: Job, members: tuple[tuple[int, str], ...]) -> bool:
    """Whether one of these will follow the new epoch, or all are certainly dead."""
    for rank, incarnation in members:
        worker = job.workers.get(rank)
        if worker is not None and worker.link is not None and incarnation in ("", worker.incarnation):
            return True
    assert job.book.placed is not None
    return members == job.book.placed.members and all(job.book.gone.get(rank, False) for rank, _ in members)


def best(job: Job, held: dict[str, Held]) -> dict[int, tuple[int, str]]:
    """Of each block that somebody has: the newest step, and who has it. If several have: not who was giving it away,
    and rather its owner. What is of an older history than others is of another state: whoever has it has missed that
    the job went back, or loaded a state.
    """
    found: dict[int, tuple[tuple[int, bool, bool], str]] = {}
    owners = job.book.owners
    history = max((message.history for message in held.values()), default=0)
    for name, message in sorted(held.items()):
        for state in message.blocks:
            if message.history < history or not 0 <= state.block < len(job.layout.blocks):
                continue
            rank = state.applied, state.block not in message.leaving, owners[state.block] == name
            if state.block not in found or rank > found[state.block][0]:
                found[state.block] = rank, name
    return {block: (rank[0], name) for block, (rank, name) in found.items()}


def is_unfilled(job: Job, change: Change) -> bool:
    """Whether the first parameters did not come to all blocks: the blocks are all there, and some of them are empty."""
    full = {state.block for held in change.held.values() for state in held.blocks if state.applied == 0}
    empty = {block for held in change.held.values() for block in held.empty}
    return bool(empty - full) and full | empty >= set(range(len(job.layout.blocks)))


def commits_of(change: Change, step: int, members: set[int]) -> tuple[HeldCommit, ...] | None:
    """Of all members for this step, as any aggregator has seen them; None if one's is nowhere."""
    found = {commit.rank: commit for held in change.held.values() for commit in held.commits if commit.step == step}
    if set(found) < members:
        return None
    return tuple(found[rank] for rank in sorted(members & set(found)))


def nobody_finds(state: State, job: Job, now: float) -> bool:
    """Whether the last snapshot is missing for all aggregators that can be asked for it, now or when they are back."""
    staying = [a for a in state.aggregators.values() if not a.draining and not a.stopping]
    return all(a.id in job.missing for a in staying if a.link is not None or now - a.unlinked < state.limits.away)
