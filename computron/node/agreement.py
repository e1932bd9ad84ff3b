"""What the shards of a group's nodes have in common: the pages, frames and cache blocks that the scheduler counts with.

A page of the group is that page of every node; a frame of the group is a frame of every node. A node whose shard is
smaller, or shares more, uses fewer of its frames than the scheduler thinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from computron.errors import ConfigError
from computron.node.wire import Loaded


@dataclass(frozen=True, slots=True)
class GroupModel:
    """A model as the group holds it. `pages`: an identity for each; `block_bytes`: on the node where it is largest."""

    pages: tuple[int, ...]
    page_counts: tuple[int, ...]  # of each node
    nbytes: int  # of all shards together
    block_bytes: int
    cache_blocks: int


@dataclass(frozen=True, slots=True)
class Agreement:
    frames: int
    page_bytes: int
    link_bandwidth: float  # of the slowest node, in frames of the group
    models: Mapping[str, GroupModel]

    def identities(self, rank: int) -> dict[str, tuple[int, ...]]:
        """For each model, of the pages of this node."""
        return {name: model.pages[: model.page_counts[rank]] for name, model in self.models.items()}


class NodeDiffers(ConfigError):
    """What a node has loaded does not belong to what the leader has. `rank`: the node's."""

    def __init__(self, rank: int, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.rank = rank


def agree(nodes: Sequence[Loaded]) -> Agreement:
    """From what each node has loaded, by rank. Raises NodeDiffers for the first that is not like the leader."""
    for rank, node in enumerate(nodes):
        _require_alike(nodes[0], rank, node)
    identities: dict[tuple[int | None, ...], int] = {}
    models = {}
    for shards in zip(*(node.shards for node in nodes), strict=True):
        name = shards[0].model
        assert all(shard.model == name for shard in shards), "all nodes have the models in the same order"
        counts = tuple(len(shard.pages) for shard in shards)
        contents = [
            tuple(shard.pages[page] if page < len(shard.pages) else None for shard in shards)
            for page in range(max(counts))
        ]
        models[name] = GroupModel(
            pages=tuple(identities.setdefault(content, len(identities)) for content in contents),
            page_counts=counts,
            nbytes=sum(shard.nbytes for shard in shards),
            block_bytes=max(shard.block_bytes for shard in shards),
            cache_blocks=min(shard.cache_blocks for shard in shards),
        )
    return Agreement(
        frames=min(node.frames for node in nodes),
        page_bytes=nodes[0].page_bytes,
        link_bandwidth=min(node.link_bandwidth for node in nodes),
        models=models,
    )


def _require_alike(leader: Loaded, rank: int, node: Loaded) -> None:
    if node.page_bytes != leader.page_bytes:
        raise NodeDiffers(
            rank,
            f"node {rank} has pages of {node.page_bytes} bytes and the leader of {leader.page_bytes}: set "
            "device.page_size, the same for all nodes",
            param="device.page_size",
        )
    for own, other in zip(leader.shards, node.shards, strict=True):
        if own.fingerprint != other.fingerprint:
            raise NodeDiffers(
                rank,
                f'model "{own.model}": its source on node {rank} is not the one that the leader has; put the same '
                "checkpoint on all hosts (and give the revision of one that is fetched from a hub)",
            )
