"""TOML -> frozen, validated dataclasses. Sizes are bytes, times are seconds, bandwidths are bytes a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Task = Literal["generate", "embed", "classify", "custom"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body: int = 32 << 20
    max_requests_per_client: int = 0  # 0: no limit
    drain_timeout: float = 30.0
    keep_alive_interval: float = 5.0  # seconds between SSE comments while a stream waits
    log_format: Literal["text", "json"] = "text"
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    kind: Literal["auto", "cuda", "host"] = "auto"
    index: int = 0
    memory: int | None = None  # for parameters and KV cache together; None: 90 % of a GPU's free memory; host: required
    page_size: int | None = None  # None: 16 MiB on CUDA, 1 MiB on host
    chunk_size: int | None = None  # None: 4 MiB on CUDA, the page on host
    link_bandwidth: float | None = None  # host only: emulated link
    link_latency: float = 0.0  # host only: seconds added to each chunk
    copy_threads: int = 1  # host only
    verify: bool = False


@dataclass(frozen=True, slots=True)
class HostConfig:
    memory: int | None = None  # budget of the host store; None: half of the machine's memory
    load_threads: int = 4
    spill_directory: Path | None = None  # pages that no checkpoint holds byte for byte; None: a temporary directory


@dataclass(frozen=True, slots=True)
class GroupConfig:
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    policy: str = "default"
    max_wait: float = 30.0
    max_queue: int = 1024  # requests waiting for one model
    prefetch: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`source`: a checkpoint folder, a hub id, or "random:" with a folder, config.json or preset; unused by `custom`."""

    id: str
    source: str = ""
    task: Task = "generate"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_batch_size: int = 16
    max_batch_tokens: int = 2048  # generate: tokens computed in one step
    max_model_len: int | None = None  # None: what the checkpoint's config says
    pinned: bool = False
    priority: int = 0
    max_queue: int | None = None  # None: scheduler.max_queue
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    normalize: bool | None = None  # embed: None as the checkpoint says
    factory: str | None = None  # custom: "package.module:function"
    batch_manager: str | None = None  # custom: "package.module:Class"; None: stack tensors
    arguments: Mapping[str, Any] = field(default_factory=dict)  # custom: the factory's keyword arguments
    seed: int = 0  # random: sources


@dataclass(frozen=True, slots=True)
class Config:
    server: ServerConfig = ServerConfig()
    device: DeviceConfig = DeviceConfig()
    host: HostConfig = HostConfig()
    group: GroupConfig = GroupConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    models: tuple[ModelConfig, ...] = ()
