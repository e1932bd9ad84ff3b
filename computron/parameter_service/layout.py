"""A job's trainable tensors in one flat space of fp32 elements, cut into blocks.

A block is what is placed, aggregated, moved and saved as one: whole small tensors of the same parameter group, or a
piece of a large one. Every tensor starts at a multiple of 64 bytes and every block at a multiple of 4 KiB, so that
blocks can be mapped one by one behind one another. A piece of a tensor starts at a multiple of 1,024 elements:
vectorised kernels then treat each element as they do when they see the whole tensor, and results are the same bit for
bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

ELEMENT = 4  # bytes of an fp32 element
TENSOR_ALIGNMENT = 16  # elements
BLOCK_ALIGNMENT = 1024  # elements: 4 KiB
BLOCK_ELEMENTS = 1 << 20  # of a block at most, by default
LARGEST_BLOCK = 1 << 24  # elements
MOST_BLOCKS = 1 << 18


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """A trainable tensor. dtype: of the worker's copy ("float32", "bfloat16", "float16"); the master copy is fp32.
    group: the place of its parameter group, whose hyperparameters it follows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """`count` elements of tensor number `tensor`, from its element `start` on, at element `offset` of the block."""

    tensor: int
    start: int
    offset: int
    count: int


class Block(msgspec.Struct, frozen=True, array_like=True):
    """start, elements: its range of the flat space, both multiples of BLOCK_ALIGNMENT."""

    index: int
    start: int
    elements: int
    group: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Of its fp32 parameters."""
        return self.elements * ELEMENT


class Layout:
    """tensors: in the order in which the forward pass uses them. offsets: where each starts, in elements."""

    def __init__(self, tensors: Sequence[TensorSpec], block_elements: int = BLOCK_ELEMENTS) -> None:
        """Raises ValueError if a tensor is empty, a name comes twice, `block_elements` is no multiple of 1,024 up to
        LARGEST_BLOCK, or there would be more than MOST_BLOCKS.
        """
        if not BLOCK_ALIGNMENT <= block_elements <= LARGEST_BLOCK or block_elements % BLOCK_ALIGNMENT:
            raise ValueError(
                f"a block has a multiple of {BLOCK_ALIGNMENT} elements, at most {LARGEST_BLOCK}, not {block_elements}"
            )
        if not tensors:
            raise ValueError("there is no tensor to train")
        twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
        if twice:
            raise ValueError(f"two tensors have the name {min(twice)}")
        if sum(-(-tensor.elements // block_elements) for tensor in tensors) > MOST_BLOCKS:
            raise ValueError(f"more than {MOST_BLOCKS} blocks: make block_elements larger")
        self.tensors = tuple(tensors)
        self.block_elements = block_elements
        self.blocks = tuple(_cut(self.tensors, block_elements))
        offsets = [0] * len(self.tensors)
        for block in self.blocks:
            for piece in block.pieces:
                if piece.start == 0:
                    offsets[piece.tensor] = block.start + piece.offset
        self.offsets = tuple(offsets)

    @property
    def elements(self) -> int:
        """Of the flat space, the gaps between tensors included."""
        last = self.blocks[-1]
        return last.start + last.elements

    def blocks_of(self, tensor: int) -> list[int]:
        """The blocks that hold a part of it."""
        return [block.index for block in self.blocks if any(piece.tensor == tensor for piece in block.pieces)]


def _cut(tensors: Sequence[TensorSpec], limit: int) -> Iterator[Block]:
    index = start = 0
    pieces: list[Piece] = []
    filled = 0

    def close() -> Block:
        return Block(index, start, _up(filled, BLOCK_ALIGNMENT), tensors[pieces[0].tensor].group, tuple(pieces))

    for number, tensor in enumerate(tensors):
        if tensor.elements == 0:
            raise ValueError(f"{tensor.name} has no elements")
        other_group = bool(pieces) and tensors[pieces[0].tensor].group != tensor.group
        if pieces and (other_group or filled + tensor.elements > limit):
            block = close()
            yield block
            index, start, pieces, filled = index + 1, start + block.elements, [], 0
        done = 0
        while done < tensor.elements:
            count = min(limit, tensor.elements - done)
            pieces.append(Piece(number, done, filled, count))
            done += count
            filled = _up(filled + count, TENSOR_ALIGNMENT)
            if done < tensor.elements:
                block = close()
                yield block
                index, start, pieces, filled = index + 1, start + block.elements, [], 0
    yield close()


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
