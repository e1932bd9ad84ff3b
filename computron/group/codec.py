"""Messages between nodes as bytes: msgpack, with arrays and tensors behind it as they lie in memory. No pickle:
decoding can make nothing but the types that it is asked for.

Messages are nested msgspec Structs and dataclasses of numbers, strings, bytes, tuples, lists, dicts, numpy arrays and
CPU tensors. Structs in a union must be tagged (`tag=True`); a dataclass, array or tensor may only be in one with None.
Under Any, which takes arrays and tensors too, tuples arrive as lists and Structs and dataclasses as dicts.

On the wire: u32 length of the msgpack part, the msgpack part, and each array's bytes at a multiple of 64 from the
start. All little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

ALIGNMENT = 64
JOINED = 16 << 10  # arrays below this size are copied together, larger ones are sent from where they lie

_ARRAY, _TENSOR = 1, 2  # msgpack extension codes
_ARRAY_TYPES = {
    np.dtype(name).newbyteorder("<").str: np.dtype(name).newbyteorder("<")
    for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}
_TENSOR_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
        torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_TENSOR_NAMES = {dtype: name for name, dtype in _TENSOR_TYPES.items()}


class _Place(msgspec.Struct, array_like=True):
    """Where an array lies, `offset` bytes behind the aligned end of the msgpack part, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


_encode_place = msgspec.msgpack.Encoder().encode
_decode_place = msgspec.msgpack.Decoder(_Place).decode


def encode(message: Any) -> list[Buffer]:
    """The message as buffers to be sent one after the other. Arrays in it must not change before they are sent.

    Raises TypeError if there is something in it that cannot travel.
    """
    arrays = _Arrays()
    head = msgspec.msgpack.Encoder(enc_hook=arrays.place).encode(message)
    return [len(head).to_bytes(4, "little") + head + bytes(-(4 + len(head)) % ALIGNMENT), *arrays.buffers]


def decode(data: Buffer, type: type[T] | Any) -> T:
    """The message in `data`, as an object of this type.

    Arrays and tensors in it lie in `data`, which they keep alive, and must not be written to (arrays cannot be).
    Raises msgspec.ValidationError if `data` is not such a message, TypeError if `type` cannot travel.
    """
    view = memoryview(data).cast("B")
    size = int.from_bytes(view[:4], "little")
    if len(view) < 4 or size > len(view) - 4:
        raise msgspec.ValidationError(f"message of {len(view)} bytes is cut off")
    start = 4 + size + -(4 + size) % ALIGNMENT
    decoder: Any = msgspec.msgpack.Decoder(type, dec_hook=_check, ext_hook=_Parts(view[start:]).take)
    try:
        return decoder.decode(view[4 : 4 + size])  # type: ignore[no-any-return]
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise msgspec.ValidationError(f"malformed message: {error}") from error


class _Arrays:
    """Collects the bytes of a message's arrays in the order in which the encoder meets them."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._size = 0

    def place(self, value: Any) -> Any:
        """What the encoder writes for a value that it does not know."""
        if isinstance(value, np.ndarray):
            dtype = value.dtype.newbyteorder("<")
            if dtype.str not in _ARRAY_TYPES:
                raise TypeError(f"arrays of {value.dtype} cannot travel")
            dense = np.ascontiguousarray(value, dtype).reshape(-1).view(np.uint8)
            return self._append(_ARRAY, dtype.str, value.shape, dense)
        if isinstance(value, torch.Tensor):
            name = _TENSOR_NAMES.get(value.dtype)
            if name is None or value.layout != torch.strided or value.device.type != "cpu":
                raise TypeError(f"tensors of {value.dtype}, {value.layout} on {value.device} cannot travel")
            flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            return self._append(_TENSOR, name, value.shape, flat.view(torch.uint8).numpy())
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"objects of type {value.__class__.__name__} cannot travel")

    def _append(self, code: int, dtype: str, shape: Sequence[int], dense: np.ndarray) -> msgspec.msgpack.Ext:
        place = msgspec.msgpack.Ext(code, _encode_place(_Place(dtype, tuple(shape), self._size)))
        buffer = dense.data
        if buffer.nbytes:
            padding = bytes(-buffer.nbytes % ALIGNMENT)
            if buffer.nbytes < JOINED:
                self.buffers.append(bytes(buffer) + padding)
            else:
                self.buffers += [buffer, padding] if padding else [buffer]
            self._size += buffer.nbytes + len(padding)
        return place


class _Parts:
    """Finds a message's arrays in `view`, the bytes behind its msgpack part."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._tensor: torch.Tensor | None = None

    def take(self, code: int, data: memoryview) -> Any:
        """The array that the decoder has found the place of."""
        try:
            return self._take(code, data)
        except (ValueError, OverflowError, RuntimeError) as error:  # a shape that is none
            raise msgspec.ValidationError(f"malformed array: {error}") from error

    def _take(self, code: int, data: memoryview) -> Any:
        if code == _ARRAY:
            place, dtype, size = self._find(data, _ARRAY_TYPES)
            if not size:
                return np.empty(place.shape, dtype)
            array = np.frombuffer(self._view[place.offset : place.offset + size], dtype)
            array.flags.writeable = False
            return array.reshape(place.shape)
        if code == _TENSOR:
            place, dtype, size = self._find(data, _TENSOR_TYPES)
            if not size:
                return torch.empty(place.shape, dtype=dtype)
            if self._tensor is None:
                self._tensor = torch.from_numpy(np.asarray(_Memory(self._view)))
            return self._tensor[place.offset : place.offset + size].view(dtype).view(place.shape)
        raise msgspec.ValidationError(f"unknown msgpack extension {code}")

    def _find(self, data: memoryview, types: dict[str, Any]) -> tuple[_Place, Any, int]:
        place = _decode_place(data)
        dtype = types.get(place.dtype)
        if dtype is None:
            raise msgspec.ValidationError(f"unknown array type {place.dtype!r}")
        if any(not 0 <= n < 1 << 62 for n in place.shape) or place.offset < 0 or place.offset % ALIGNMENT:
            raise msgspec.ValidationError(f"an array has the shape {place.shape} at {place.offset}")
        size = math.prod(place.shape) * dtype.itemsize
        if place.offset + size > len(self._view):
            raise msgspec.ValidationError(f"an array of {size} bytes is cut off")
        return place, dtype, size


class _Memory:
    """Lets numpy see read-only bytes as writable: torch warns of read-only arrays, and nobody writes to these."""

    def __init__(self, view: memoryview) -> None:
        self._bytes = np.frombuffer(view, np.uint8)
        self.__array_interface__ = {
            "data": (self._bytes.ctypes.data, False),
            "shape": self._bytes.shape,
            "typestr": "|u1",
            "version": 3,
        }


def _check(type: type, value: Any) -> Any:
    """An array or tensor where the message's type asks for one."""
    if isinstance(value, type):
        return value
    raise msgspec.ValidationError(f"expected {type.__name__}, got {value.__class__.__name__}")
