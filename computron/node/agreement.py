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


def agree(nodes: Sequence[Loaded]) -> Agreement:
    """From what each node has loaded, by rank. Raises ConfigError if pages have different sizes."""
    sizes = {node.page_bytes for node in nodes}
    if len(sizes) > 1:
        listed = ", ".join(f"node {rank}: {node.page_bytes}" for rank, node in enumerate(nodes))
        raise ConfigError(
            f"all nodes must have pages of one size, set device.page_size ({listed})", param="device.page_size"
        )
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
        page_bytes=sizes.pop(),
        link_bandwidth=min(node.link_bandwidth for node in nodes),
        models=models,
    )
