from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from computron.group.codec import ALIGNMENT, JOINED, decode, encode


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    values: np.ndarray
    weights: dict[str, torch.Tensor]


class Order(msgspec.Struct, frozen=True, tag=True):
    number: int
    parts: tuple[Part, ...]
    mask: torch.Tensor | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    reason: str
    anything: Any = None


def carried(message: Any, type: Any) -> Any:
    return decode(b"".join(encode(message)), type)


def test_nested_messages_arrive_with_their_arrays_and_tensors() -> None:
    values = np.arange(6, dtype=np.int64).reshape(2, 3)
    order = Order(7, (Part("a", values, {"w": torch.eye(3)}), Part("b", values[:, :0], {})), torch.tensor([True]))
    got = carried(order, Order | Stop)
    assert isinstance(got, Order)
    assert (got.number, [part.name for part in got.parts]) == (7, ["a", "b"])
    np.testing.assert_array_equal(got.parts[0].values, values)
    assert got.parts[1].values.shape == (2, 0)
    assert torch.equal(got.parts[0].weights["w"], torch.eye(3))
    assert got.mask is not None
    assert got.mask.dtype == torch.bool


def test_a_union_tells_its_members_apart() -> None:
    got = carried(Stop("why", [1, (np.ones(2), {"t": torch.ones(())})]), Order | Stop)
    assert isinstance(got, Stop)
    np.testing.assert_array_equal(got.anything[1][0], np.ones(2))
    assert torch.equal(got.anything[1][1]["t"], torch.ones(()))


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    seed=st.integers(0, 1000),
    transposed=st.booleans(),
)
def test_tensors_arrive_bit_for_bit(dtype: torch.dtype, shape: list[int], seed: int, transposed: bool) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    tensor = (numbers > 0 if dtype == torch.bool else numbers.abs().to(dtype)).reshape(shape)
    if transposed:
        tensor = tensor.permute(list(reversed(range(tensor.dim()))))
    got = carried((tensor, "after"), tuple[torch.Tensor, str])[0]
    assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
    as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (got, tensor)]
    assert torch.equal(*as_bytes)


@given(
    st.lists(
        arrays.arrays(
            st.one_of(
                arrays.boolean_dtypes(),
                arrays.integer_dtypes(endianness="="),
                arrays.unsigned_integer_dtypes(endianness="?"),
                arrays.floating_dtypes(sizes=(16, 32, 64), endianness="?"),
                arrays.complex_number_dtypes(sizes=(64, 128)),
            ),
            arrays.array_shapes(min_dims=0, min_side=0, max_side=5),
        ),
        max_size=4,
    )
)
def test_arrays_arrive_as_they_were(sent: list[np.ndarray]) -> None:
    got = carried(sent, list[np.ndarray])
    assert [a.shape for a in got] == [a.shape for a in sent]
    for one, other in zip(got, sent, strict=True):
        assert one.dtype == other.dtype.newbyteorder("<")
        np.testing.assert_array_equal(one, other)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_data_arrives_as_it_was(value: Any) -> None:
    assert carried(value, Any) == value


def test_large_arrays_are_sent_from_where_they_lie() -> None:
    array = np.zeros(JOINED, np.uint8)
    views = [part for part in encode([array, 1]) if isinstance(part, memoryview)]
    assert len(views) == 1
    array[5] = 1
    assert views[0][5] == 1


def test_what_was_decoded_lies_in_the_message_at_an_aligned_place() -> None:
    data = b"".join(encode((np.arange(3), torch.arange(5.0), np.arange(4.0))))
    array, tensor, other = decode(data, tuple[np.ndarray, torch.Tensor, np.ndarray])
    start = np.frombuffer(data, np.uint8).ctypes.data
    places = [array.ctypes.data - start, tensor.data_ptr() - start, other.ctypes.data - start]
    assert all(0 <= place < len(data) and place % ALIGNMENT == 0 for place in places)
    assert not array.flags.writeable
    del data
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_numpy_numbers_arrive_as_numbers() -> None:
    assert carried([np.int64(3), np.float32(0.5)], list[float]) == [3.0, 0.5]


@pytest.mark.parametrize(
    "value",
    [object(), np.array(["text"]), np.array([object()]), torch.empty(2, device="meta"), torch.eye(2).to_sparse(), len],
)
def test_what_cannot_travel_is_refused_at_the_sender(value: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot travel|not supported"):
        encode([value])


@pytest.mark.parametrize(
    ("message", "type", "complaint"),
    [
        ([1], list[np.ndarray], "expected ndarray, got int"),
        ([np.ones(1)], list[torch.Tensor], "expected Tensor, got ndarray"),
        ([np.ones(1)], list[int], "Expected `int`"),
        ({"number": 1}, Order | Stop, "missing required field `type`"),
        ([1, 2], tuple[int], "Expected `array` of length 1"),
    ],
)
def test_a_message_of_another_type_is_refused(message: Any, type: Any, complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        carried(message, type)


def framed(head: bytes, behind: bytes = b"") -> bytes:
    return len(head).to_bytes(4, "little") + head + bytes(-(4 + len(head)) % ALIGNMENT) + behind


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize(
    "place",
    [
        ["<f4" , [4], 0],
        ["float32", [4], 0],
        ["<f4", [-1, -1], 0],
        ["float32", [0, -1], 0],
        ["<f4", [1], -64],
        ["float32", [1], 3],
        ["|O", [1], 0],
        ["<f4", [0, 2**62, 2**62], 0],
        ["float32", [0, 2**62, 2**62], 0],
        ["float32", [0, 2**64 - 1], 0],
        ["<f4", [1] * 100, 0],
        ["<f4", "four", 0],
        [],
    ],
)  # fmt: skip
def test_an_array_that_is_not_there_is_refused(code: int, place: list[Any]) -> None:
    encoded = msgspec.msgpack.encode(place)
    data = framed(msgspec.msgpack.encode(msgspec.msgpack.Ext(code, encoded)), bytes(8))
    with pytest.raises(msgspec.ValidationError):
        decode(data, Any)


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0", b"\xff\xff\xff\xff", framed(b""), framed(b"\xc1"), framed(b"\xa1\xff")]
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(data, Any)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(framed(b"\x91" * 100_000), Any)


MESSAGE = b"".join(encode(Order(1, (Part("a", np.arange(3), {"w": torch.ones(2)}),), torch.ones(1))))


@given(st.data())
def test_a_damaged_message_is_refused_or_read_as_another(data: st.DataObject) -> None:
    damaged = bytearray(MESSAGE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        got = decode(bytes(damaged), Order | Stop)
    except msgspec.ValidationError:
        return
    assert isinstance(got, Order | Stop)
