"""What a worker waits for, in words, for the log."""

from __future__ import annotations

from computron.parameter_service.agent.actions import Peer
from computron.parameter_service.agent.progress import Progress


def waits_for(progress: Progress, load: int) -> str:
    """load: the number of the load that this worker wants; 0 for none."""
    if progress.epoch == 0:
        return (
            "the master's placement, which comes when a master, an aggregator and all workers of the job are there; "
            "`computron parameter-service jobs` tells what is not"
        )
    away = {block.owner for block in progress.blocks if not block.hosted}
    if away:
        states = ", ".join(f"{name} ({_state(progress.peers[name])})" for name in sorted(away))
        return f"aggregators to have the job's blocks: {states}"
    ledger = progress.ledger
    if ledger.stale:
        return f"the parameters of {len(ledger.stale)} blocks"
    if load > progress.loads.begun:
        return "the other workers to load a state, too"
    if load:
        return "the state that is loaded to be in a snapshot"
    if progress.wants_norm:
        return "the other workers to ask for the gradient's norm"
    if not progress.wants_step:
        return "nothing"
    if ledger.unplaced:
        return f"the gradients of {len(ledger.unplaced)} blocks to be staged"
    return f"{len(ledger.missing)} blocks to see step {progress.step + 1}, which other workers may not have committed"


def _state(peer: Peer) -> str:
    if not peer.connected:
        return "not connected"
    return "it has not all of them yet" if peer.joined else "no answer yet"
