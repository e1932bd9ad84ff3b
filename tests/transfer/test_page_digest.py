"""The digest of a page, against xxhash."""

from __future__ import annotations

import ctypes

import pytest
import xxhash

from computron._transfer import page_digest

SIZES = [0, 1, 3, 4, 7, 8, 31, 32, 33, 63, 4095, 4096, 4097, 8192, 10000, 65535, 65536]


def reference(data: bytes) -> bytes:
    leaves = b"".join(
        xxhash.xxh64_intdigest(data[at : at + 4096]).to_bytes(8, "little") for at in range(0, len(data), 4096)
    )
    return b"".join(xxhash.xxh64_intdigest(leaves, seed).to_bytes(8, "little") for seed in (0, 1))


@pytest.mark.parametrize("size", SIZES)
def test_a_digest_in_host_memory(device, size):
    data = device.bytes(size)
    buffer = ctypes.create_string_buffer(data, max(size, 1))
    assert page_digest(ctypes.addressof(buffer), size) == reference(data)


@pytest.mark.parametrize("size", SIZES)
def test_a_digest_on_the_device(device, size):
    pool = device.pool(2)
    _, frame = pool.allocate(2)
    data = device.bytes(device.frame)
    pool.write(frame, 0, data)
    assert pool.digest(frame, size) == reference(data[:size])


def test_a_digest_tells_one_flipped_bit(device):
    pool = device.pool(1)
    (frame,) = pool.allocate(1)
    data = bytearray(device.bytes(device.frame))
    pool.write(frame, 0, data)
    whole = pool.digest(frame, device.frame)
    data[device.frame // 2 + 77] ^= 4
    pool.write(frame, 0, data)
    assert pool.digest(frame, device.frame) != whole


def test_without_a_kernel_the_page_is_copied_back(standin_only):
    device = standin_only
    data = device.bytes(device.frame)
    digests = []
    for refused in (False, True):
        if refused:
            device.standin.refuse_modules()
        launches = device.standin.count("launches")
        pool = device.pool(1)
        (frame,) = pool.allocate(1)
        pool.write(frame, 0, data)
        digests.append(pool.digest(frame, device.frame))
        if refused:
            assert device.standin.count("launches") == launches
    assert digests == [reference(data)] * 2
