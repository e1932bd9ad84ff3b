"""What nodes say to each other while all is well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from computron.errors import GroupBroken
from computron.group.communicator import GroupCommunicator
from computron.group.sockets import WHOLE
from computron.models.shard import Shard

Form = Callable[[int, int], Any]

SHAPES = [(1, 576), (7,), (), (0, 5), (3, 1, 2), (WHOLE // 4 + 3,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)


def summed(parts: list[Tensor]) -> Tensor:
    """In order, half precision in float32 and rounded once."""
    wide = torch.float32 if parts[0].dtype in (torch.bfloat16, torch.float16) else parts[0].dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_all_nodes_get_the_same_sum_to_the_bit(threads: Form, nodes: int) -> None:
    group = threads(nodes, 1)
    for dtype in DTYPES:
        for shape in SHAPES:
            parts = [filled(shape, dtype, seed) for seed in range(nodes)]
            for got in group.each(lambda c, rank, parts=parts: c.all_reduce(parts[rank].clone())):
                assert got.dtype == dtype
                assert torch.equal(got, summed(parts))


@pytest.mark.parametrize("nodes", [2, 3])
def test_tensors_larger_than_the_kernels_buffers_are_reduced(threads: Form, nodes: int) -> None:
    parts = [filled((6 << 20,), torch.float32, seed) for seed in range(nodes)]
    for got in threads(nodes, 1).each(lambda c, rank: c.all_reduce(parts[rank].clone())):
        assert torch.equal(got, summed(parts))


def test_a_tensor_that_is_not_dense_is_reduced(threads: Form) -> None:
    def reduce(c: GroupCommunicator, rank: int) -> Tensor:
        with torch.inference_mode():
            return c.all_reduce(torch.arange(6.0).reshape(2, 3).T)

    for got in threads(2, 1).each(reduce):
        assert got.tolist() == [[0, 6], [2, 8], [4, 10]]


def test_parts_of_any_width_are_joined(threads: Form) -> None:
    sizes = [3, 0, 2]
    for dtype in (torch.float32, torch.bfloat16):
        whole = filled((4, 2, sum(sizes)), dtype, 1)
        parts = whole.split(sizes, dim=-1)
        for got in threads(3, 1).each(lambda c, rank, parts=parts: c.all_gather(parts[rank], sizes)):
            assert torch.equal(got, whole)


def test_a_part_of_another_width_than_announced_is_refused(threads: Form) -> None:
    with pytest.raises(ValueError, match="cannot have the sizes"):
        threads(2, 1).communicators[0].all_gather(torch.ones(1, 2), [3, 3])


def test_stages_pass_tensors_on_between_nodes_of_the_same_rank(threads: Form) -> None:
    group = threads(2, 3)
    kinds = [torch.empty(2, 3), torch.empty(4, dtype=torch.bfloat16), torch.empty(0, 7), torch.empty(())]

    def step(c: GroupCommunicator, rank: int) -> list[Tensor]:
        received = []
        for kind in kinds:
            tensor = c.receive(kind) if rank >= 2 else torch.full_like(kind, rank)
            received.append(tensor)
            if rank < 4:
                c.send(c.all_reduce(tensor.clone()) if rank >= 2 else tensor)
        return received

    for rank, got in enumerate(group.each(step)):
        expected = [rank, rank - 2, 1][rank // 2]
        assert [t.dtype for t in got] == [t.dtype for t in kinds]
        assert all(torch.equal(t, torch.full_like(kind, expected)) for t, kind in zip(got, kinds, strict=True))


def test_sending_waits_for_nobody(threads: Form) -> None:
    group = threads(1, 2)
    count, size = 12, 1 << 20

    def send() -> None:
        for number in range(count):
            group.communicators[0].send(torch.full((size,), float(number)))

    group.start(0, send).result(30)
    for number in range(count):
        got = group.start(1, group.communicators[1].receive, torch.empty(size)).result(30)
        assert torch.equal(got, torch.full((size,), float(number)))
    group.start(0, group.communicators[0].send, torch.ones(3)).result(30)
    assert group.start(1, group.communicators[1].receive, torch.empty(3)).result(30).tolist() == [1, 1, 1]


def test_what_was_sent_before_a_node_left_still_arrives(threads: Form) -> None:
    """However large it is."""
    group = threads(1, 2)
    first, second = group.communicators
    sent = filled((4 << 20,), torch.float32, 1)
    first.send(sent)
    first.leave("it has failed")
    assert torch.equal(second.receive(sent), sent)
    with pytest.raises(GroupBroken, match="it has failed"):
        first.send(sent)
    first.abort()
    with pytest.raises(GroupBroken):
        second.receive(sent)


def test_a_node_alone_needs_nobody() -> None:
    alone = GroupCommunicator(Shard())
    tensor = torch.ones(2)
    assert alone.all_reduce(tensor) is tensor
    assert alone.all_gather(tensor, [2]) is tensor
    alone.form(1, "127.0.0.1", 1, 1.0)
    alone.settle()


def test_a_stage_of_one_node_reduces_without_a_word(threads: Form) -> None:
    for got in threads(1, 2).each(lambda c, rank: c.all_reduce(torch.full((2,), float(rank)))):
        assert got[0] == got[1]


def test_nothing_is_said_before_the_group_is_formed() -> None:
    c = GroupCommunicator(Shard(2, 0, 2, 0))
    for call in (lambda: c.all_reduce(torch.ones(1)), lambda: c.send(torch.ones(1)), c.settle):
        with pytest.raises(GroupBroken, match="has not been formed yet"):
            call()


def test_a_group_may_form_again_and_again(threads: Form) -> None:
    group = threads(2, 2)
    for _ in range(5):
        group.form()
        assert [t.item() for t in group.each(lambda c, _: c.all_reduce(torch.ones(())))] == [2.0] * 4
