"""From the configuration to a device, a host store and what moves pages between them."""

from __future__ import annotations

import logging
import os

from computron import _transfer
from computron.config import Config, DeviceConfig
from computron.errors import ConfigError
from computron.memory.host_store import HostStore
from computron.memory.swapper import Swapper

log = logging.getLogger(__name__)

KIB = 1 << 10
MIB = 1 << 20

DEFAULT_PAGE = {"host": 1 * MIB, "cuda": 16 * MIB}
DEFAULT_CHUNK = {"host": 1 * MIB, "cuda": 4 * MIB}
LINK_BANDWIDTH = {"host": 8e9, "cuda": 25e9}  # bytes a second, until the first swaps have been measured
GPU_SHARE = 0.9  # of the free memory of a GPU, where the configuration names no amount: the rest is for activations
GROUP_GPU_SHARE = 0.85  # likewise on one of several nodes, whose NCCL connections have buffers on the GPU too
HOST_STORE_SHARE = 0.5  # of the machine's memory, likewise


def open_backend(config: DeviceConfig, local_rank: int = 0) -> _transfer.Backend:
    """The backend that the configuration asks for; of several nodes on this machine each has a GPU of its own.

    Raises ConfigError with the reason if it cannot be had.
    """
    kind = config.kind
    if kind == "auto":
        kind = "host" if _transfer.cuda_unavailable_reason() is not None else "cuda"
    if kind == "host":
        return _transfer.host_backend(
            link_bandwidth=config.link_bandwidth, link_latency=config.link_latency, copy_threads=config.copy_threads
        )
    reason = _transfer.cuda_unavailable_reason()
    if reason is not None:
        raise ConfigError(f'device.kind is "cuda", but no CUDA device can be used: {reason}', param="device.kind")
    if config.link_bandwidth is not None:
        raise ConfigError("device.link_bandwidth emulates a link on the host backend only", param="device.kind")
    try:
        return _transfer.cuda_backend(config.index + local_rank)
    except _transfer.TransferError as error:
        raise ConfigError(
            f"CUDA device {config.index + local_rank} cannot be used: {error}", param="device.index"
        ) from error


def page_size(config: DeviceConfig, backend: _transfer.Backend) -> int:
    """Bytes of a page. Raises ConfigError if the backend cannot map pages of the configured size."""
    size = config.page_size or DEFAULT_PAGE[backend.kind]
    if size % backend.granularity:
        raise ConfigError(
            f"device.page_size is {size}, but must be a multiple of {backend.granularity} on {backend.device_name}",
            param="device.page_size",
        )
    return size


def open_store(config: Config, backend: _transfer.Backend, page_bytes: int, nodes_here: int) -> HostStore:
    """The host store of one of the nodes on this machine. Raises ConfigError if the machine cannot give its budget."""
    budget = config.host.memory or int(_memory("MemTotal") * HOST_STORE_SHARE / nodes_here)
    available = _memory("MemAvailable")
    if budget > available:
        log.warning(
            "host_memory_above_available budget=%d available=%d remedy=%s",
            budget, available, "lower host.memory, or nodes on this machine may be killed for lack of memory",
        )  # fmt: skip
    try:
        return HostStore(
            backend,
            budget=budget,
            page_bytes=page_bytes,
            load_threads=config.host.load_threads,
            spill_directory=config.host.spill_directory,
        )
    except (_transfer.TransferError, MemoryError) as error:
        raise ConfigError(f"host.memory of {budget} bytes cannot be had: {error}", param="host.memory") from error


def open_swapper(
    config: DeviceConfig, backend: _transfer.Backend, store: HostStore, page_bytes: int, share: float = GPU_SHARE
) -> Swapper:
    """The device's memory: `share` of a GPU's that is free, unless the configuration names an amount.

    Raises ConfigError if it is not given, holds no page, or cannot be had.
    """
    memory = config.memory
    if memory is None:
        if backend.kind == "host":
            raise ConfigError('set device.memory, for example "2GiB", on the host backend', param="device.memory")
        memory = int(backend.free_memory * share)
    if memory < page_bytes:
        raise ConfigError(f"device.memory is {memory} bytes, less than one page of {page_bytes}", param="device.memory")
    try:
        return Swapper(
            backend,
            store,
            device_memory=memory,
            page_bytes=page_bytes,
            chunk_bytes=min(config.chunk_size or DEFAULT_CHUNK[backend.kind], page_bytes),
            verify=config.verify,
        )
    except (_transfer.TransferError, MemoryError) as error:
        raise ConfigError(
            f"device.memory of {memory / MIB:.0f} MiB cannot be had on {backend.device_name}: {error}",
            param="device.memory",
        ) from error


def _memory(field: str) -> int:
    """Bytes, as the system tells in /proc/meminfo."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * KIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
