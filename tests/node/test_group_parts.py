"""What a leader puts together from what its nodes report: shards to models, swaps to one swap."""

from __future__ import annotations

import pytest

from computron.memory.swap import SwapOutcome
from computron.node.agreement import NodeDiffers, agree
from computron.node.group_swaps import GroupSwaps
from computron.node.wire import Loaded, ShardInfo


def loaded(
    frames: int, *shards: tuple[str, tuple[int, ...], int, int], page_bytes: int = 64, fingerprint: str = "f"
) -> Loaded:
    infos = tuple(
        ShardInfo(name, fingerprint, 10 * len(pages), pages, block, blocks) for name, pages, block, blocks in shards
    )
    return Loaded(frames, page_bytes, 1e9, infos)


def outcome(pages, state="done", arrived=None, error=None, seconds=1.0) -> SwapOutcome:
    arrived = pages if arrived is None else arrived
    return SwapOutcome("m", pages, state, arrived, seconds, 100, error, 0.0, seconds)


# Shards


def test_pages_are_shared_by_the_group_where_all_its_nodes_share_them():
    agreement = agree(
        [
            loaded(30, ("a", (5, 6, 7), 160, 9), ("b", (5, 6, 8), 160, 9)),
            loaded(20, ("a", (1, 2), 200, 12), ("b", (1, 3), 200, 12)),
        ]
    )
    a, b = agreement.models["a"], agreement.models["b"]
    assert a.pages[0] == b.pages[0]
    assert len({*a.pages, *b.pages}) == 5, "the second page is equal on one node alone, the third differs"
    assert (agreement.frames, a.nbytes, a.block_bytes, a.cache_blocks) == (20, 50, 200, 9)
    assert agreement.identities(0)["a"] == a.pages
    assert agreement.identities(1)["a"] == a.pages[:2]


def test_pages_of_different_sizes_are_refused_with_both():
    with pytest.raises(NodeDiffers, match="node 1 has pages of 128 bytes and the leader of 64") as refused:
        agree([loaded(1, ("a", (1,), 0, 0)), loaded(1, ("a", (1,), 0, 0), page_bytes=128)])
    assert refused.value.rank == 1


def test_a_model_from_another_source_is_refused_by_its_name():
    same = loaded(1, ("a", (1,), 0, 0))
    with pytest.raises(NodeDiffers, match='model "a": its source on node 2') as refused:
        agree([same, same, loaded(1, ("a", (1,), 0, 0), fingerprint="g")])
    assert refused.value.rank == 2


# Swaps


@pytest.fixture
def swaps():
    """Of a model with three pages on node 0 and two on node 1."""
    return GroupSwaps({"m": (3, 2)})


def test_a_swap_is_done_when_it_is_done_everywhere(swaps):
    assert swaps.begin("m", (0, 1, 2)) == {0: (0, 1, 2), 1: (0, 1)}
    assert swaps.end(0, outcome((0, 1, 2))) is None
    merged = swaps.end(1, outcome((0, 1), seconds=3.0))
    assert (merged.outcome.state, merged.outcome.arrived, merged.outcome.seconds) == ("done", (0, 1, 2), 3.0)
    assert merged.outcome.bytes_moved == 200
    assert not merged.surplus


def test_a_swap_that_fails_on_one_node_leaves_surplus_on_the_others(swaps):
    swaps.begin("m", (0, 1, 2))
    swaps.end(0, outcome((0, 1, 2)))
    merged = swaps.end(1, outcome((0, 1), "failed", (), "the link fell down"))
    assert (merged.outcome.state, merged.outcome.arrived) == ("failed", ())
    assert merged.outcome.error == "node 1: the link fell down"
    assert merged.surplus == {0: (0, 1, 2)}


def test_of_a_cancelled_swap_those_pages_stay_that_came_everywhere(swaps):
    swaps.begin("m", (0, 1, 2))
    swaps.end(0, outcome((0, 1, 2), "cancelled", (0, 2)))
    merged = swaps.end(1, outcome((0, 1)))
    assert (merged.outcome.state, merged.outcome.arrived) == ("cancelled", (0, 2))
    assert merged.surplus == {1: (1,)}


def test_a_node_without_such_pages_is_not_asked(swaps):
    assert swaps.begin("m", (2,)) == {0: (2,)}
    assert swaps.end(0, outcome((2,))).outcome.state == "done"
    assert swaps.pages_of("m", (2, 1)) == {0: (2, 1), 1: (1,)}
