from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computron.parameter_service.layout import BLOCK_ALIGNMENT, TENSOR_ALIGNMENT, Layout, TensorSpec

SHAPES = st.lists(st.lists(st.integers(1, 80), max_size=3).map(tuple), min_size=1, max_size=12)
GROUPS = st.lists(st.integers(0, 2), min_size=12, max_size=12)


@given(SHAPES, GROUPS, st.integers(1, 6))
def test_every_element_lies_in_one_block_and_blocks_side_by_side(shapes, groups, thousands) -> None:
    tensors = [TensorSpec(f"t{i}", shape, "float32", groups[i]) for i, shape in enumerate(shapes)]
    layout = Layout(tensors, thousands * BLOCK_ALIGNMENT)
    end = 0
    found: dict[int, int] = {}
    for number, block in enumerate(layout.blocks):
        assert block.index == number
        assert block.start == end
        assert block.start % BLOCK_ALIGNMENT == block.elements % BLOCK_ALIGNMENT == 0
        assert 0 < block.elements <= thousands * BLOCK_ALIGNMENT
        end += block.elements
        filled = 0
        for piece in block.pieces:
            assert tensors[piece.tensor].group == block.group
            assert piece.start == found.get(piece.tensor, 0)
            assert piece.start % BLOCK_ALIGNMENT == 0
            assert piece.offset >= filled
            assert piece.offset % TENSOR_ALIGNMENT == 0
            filled = piece.offset + piece.count
            assert block.start + piece.offset == layout.offsets[piece.tensor] + piece.start
            found[piece.tensor] = piece.start + piece.count
        assert filled <= block.elements
    assert layout.elements == end
    assert found == {number: math.prod(shape) for number, shape in enumerate(shapes)}
    for number in range(len(tensors)):
        assert layout.blocks_of(number) == [b.index for b in layout.blocks if number in {p.tensor for p in b.pieces}]


def test_small_tensors_share_a_block_and_large_ones_are_cut() -> None:
    tensors = [TensorSpec("a", (10,), "float32", 0), TensorSpec("b", (3, 7), "float32", 0)]
    tensors += [TensorSpec("c", (2500,), "float32", 0), TensorSpec("d", (), "float32", 0)]
    layout = Layout(tensors, 2048)
    assert [[(p.tensor, p.start, p.offset, p.count) for p in block.pieces] for block in layout.blocks] == [
        [(0, 0, 0, 10), (1, 0, 16, 21)],
        [(2, 0, 0, 2048)],
        [(2, 2048, 0, 452), (3, 0, 464, 1)],
    ]


@pytest.mark.parametrize(
    ("tensors", "block", "said"),
    [
        ([], 1024, "no tensor"),
        ([TensorSpec("a", (0, 3), "float32", 0)], 1024, "a has no elements"),
        ([TensorSpec("a", (1,), "float32", 0)] * 2, 1024, "two tensors have the name a"),
        ([TensorSpec("a", (1,), "float32", 0)], 1000, "multiple of 1024"),
    ],
)
def test_what_cannot_be_laid_out_is_told(tensors, block, said) -> None:
    with pytest.raises(ValueError, match=said):
        Layout(tensors, block)
