"""TOML -> frozen, validated dataclasses. Sizes are bytes, times are seconds, bandwidths are bytes a second."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from computron._toml import Bandwidth, Bounds, Document, Duration, KeyPath, Size, suggestion
from computron.errors import ComputronError

Task = Literal["generate", "embed", "classify", "custom"]
Count = Annotated[int, Bounds(low=1)]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"
    port: Annotated[int, Bounds(low=0, high=65535)] = 8000  # 0: any free port
    api_key: str | None = None
    max_body: Annotated[Size, Bounds(above=0)] = 32 << 20
    max_priority: Annotated[int, Bounds(low=0)] = 10  # that a request may ask for
    max_requests_per_client: Annotated[int, Bounds(low=0)] = 0  # 0: no limit
    drain_timeout: Duration = 30.0
    keep_alive_interval: Annotated[Duration, Bounds(above=0)] = 5.0  # between SSE comments while a stream waits
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    kind: Literal["auto", "cuda", "host"] = "auto"
    index: Annotated[int, Bounds(low=0)] = 0
    memory: Annotated[Size, Bounds(above=0)] | None = None  # None: 90 % of a GPU's free memory (85 % in a group)
    page_size: Annotated[Size, Bounds(above=0)] | None = None  # None: 16 MiB on CUDA, 1 MiB on host
    chunk_size: Annotated[Size, Bounds(above=0)] | None = None  # None: 4 MiB on CUDA, the page on host
    link_bandwidth: Annotated[Bandwidth, Bounds(above=0)] | None = None  # host only: emulated link
    link_latency: Duration = 0.0  # host only: added to each chunk
    copy_threads: Count = 1  # host only
    verify: bool = False


@dataclass(frozen=True, slots=True)
class HostConfig:
    memory: Annotated[Size, Bounds(above=0)] | None = None  # of the host store; None: half of the machine's memory
    load_threads: Count = 4
    spill_directory: Path | None = None  # pages that no checkpoint holds byte for byte; None: a temporary directory


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """The nodes that serve the same models together: `tensor_parallel` times `pipeline_parallel` of them."""

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    node_timeout: Annotated[Duration, Bounds(above=0)] = 10.0  # a node not heard of for so long counts as lost
    recovery_timeout: Duration = 60.0  # requests in flight wait so long for the group to form anew

    @property
    def nodes(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    policy: str = "default"
    max_wait: Annotated[Duration, Bounds(above=0)] = 30.0
    max_queue: Count = 1024  # requests waiting for one model
    prefetch: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`source`: a checkpoint folder, a hub id, or "random:" with a folder, config.json or preset; none for `custom`."""

    id: str
    source: str = ""
    task: Task = "generate"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_batch_size: Count = 16
    max_batch_tokens: Count = 2048  # generate: tokens computed in one step
    max_model_len: Count | None = None  # None: what the checkpoint's config says
    pinned: bool = False
    priority: int = 0
    max_queue: Count | None = None  # None: scheduler.max_queue
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


POLICIES = ("default", "lru")


def load_config(path: str | Path, *, sources_exist: bool = True) -> Config:
    """The configuration in this file; relative paths in it start at its folder.

    `sources_exist`: whether it is wrong if a model's folder does not exist; otherwise that is found when it is loaded.
    Raises ConfigError, naming file, line and remedy, for the first thing that is wrong.
    """
    document = Document(Path(path))
    sections = {"server": ServerConfig, "device": DeviceConfig, "host": HostConfig, "group": GroupConfig,
                "scheduler": SchedulerConfig}  # fmt: skip
    for key in document.data:
        if key not in sections and key != "models":
            known = suggestion(key, [*sections, "models"], "known tables: ")
            raise document.error((key,), f'unknown table or key "{key}"{known}')
    config = Config(
        server=document.read(("server",), document.data.get("server", {}), ServerConfig),
        device=document.read(("device",), document.data.get("device", {}), DeviceConfig),
        host=document.read(("host",), document.data.get("host", {}), HostConfig),
        group=document.read(("group",), document.data.get("group", {}), GroupConfig),
        scheduler=document.read(("scheduler",), document.data.get("scheduler", {}), SchedulerConfig),
        models=_read_models(document),
    )
    default = config.scheduler.max_queue
    models = tuple(replace(m, max_queue=default if m.max_queue is None else m.max_queue) for m in config.models)
    if sources_exist:
        _check_sources(document, models)
    _check_device(document, config.device)
    _check_scheduler(document, config.scheduler)
    return replace(config, host=_with_paths(document, config.host), models=models)


def with_place(path: str | Path, error: ComputronError) -> str:
    """The message of an error that came up after loading, with the file and line that it is about, where it is known:
    from its `param` ("device.memory"), or from the model that the message begins with. What is wrong with a `source`
    that is no path is said with the folder that it would be.
    """
    document = Document(Path(path))
    where: KeyPath = ()
    message = error.message
    if error.param is not None:
        where = tuple(error.param.split("."))
    elif named := re.match(r"""model ["']([^"']+)["'](?:: (?:its )?(\w+))?""", error.message):
        ids = [model.get("id") for model in document.data.get("models", [])]
        if named[1] in ids:
            where = ("models", ids.index(named[1]), named[2] or "")
            source = document.data["models"][where[1]].get("source", "")
            folder = _resolve(document, source.removeprefix("random:"))
            if named[2] == "source" and not folder.exists():
                message += f" (as a folder it would be {folder})"
    return document.error(where, message).message if where else message


def _read_models(document: Document) -> tuple[ModelConfig, ...]:
    tables = document.data.get("models", [])
    if not isinstance(tables, list):
        raise document.error(("models",), "write each model under a header of its own: [[models]]")
    if not tables:
        raise document.error((), 'no models: add a [[models]] table with an "id" and a "source" for each')
    models: list[ModelConfig] = []
    first: dict[str, int] = {}
    for number, table in enumerate(tables):
        where = ("models", number)
        model = document.read(where, table, ModelConfig)
        if model.id in first:
            raise document.error(
                (*where, "id"), f'model id "{model.id}" is taken by the [[models]] table number {first[model.id] + 1}'
            )
        first[model.id] = number
        models.append(_check_model(document, where, model, table))
    return tuple(models)


def _check_model(document: Document, where: KeyPath, model: ModelConfig, table: Mapping[str, Any]) -> ModelConfig:
    if not re.fullmatch(r"[^\s/?#%]+(/[^\s/?#%]+)*", model.id):
        raise document.error((*where, "id"), f'id: "{model.id}" must not be empty nor contain spaces or any of ? # %')
    custom_only = ("factory", "batch_manager", "arguments")
    if model.task == "custom":
        if model.factory is None:
            raise document.error(
                where, f'model "{model.id}" has task "custom" and needs factory = "package.module:function"'
            )
        for key in ("factory", "batch_manager"):
            value = table.get(key)
            if value is not None and not re.fullmatch(r"[\w.]+:[\w.]+", value):
                raise document.error((*where, key), f'{key}: "{value}" must look like "package.module:name"')
        return model
    for key in custom_only:
        if key in table:
            raise document.error((*where, key), f'{key}: only models with task = "custom" have one')
    if not model.source:
        raise document.error(
            where, f'model "{model.id}" needs a source: a checkpoint folder, a hub id, or "random:" with a config'
        )
    return replace(
        model,
        source=_resolve_source(document, model.source),
        chat_template=_resolve_template(document, where, model.chat_template),
    )


def _resolve_source(document: Document, source: str) -> str:
    """The source with its path made absolute. A hub id stays as it is, unless a folder of that name is there."""
    prefix = "random:" if source.startswith("random:") else ""
    name = source.removeprefix(prefix)
    path = _resolve(document, name)
    if path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        return f"{prefix}{path}"
    return source


def _check_sources(document: Document, models: Sequence[ModelConfig]) -> None:
    for number, model in enumerate(models):
        path = Path(model.source.removeprefix("random:"))
        if path.is_absolute() and not path.exists():
            raise document.error(("models", number, "source"), f"source: {path} does not exist")


def _resolve_template(document: Document, where: KeyPath, template: str | None) -> str | None:
    """A template given as a file becomes an absolute path; any other text is the template itself."""
    if template is None or "{" in template:
        return template
    path = _resolve(document, template)
    if not path.is_file():
        raise document.error((*where, "chat_template"), f"chat_template: {path} does not exist")
    return str(path)


def _resolve(document: Document, name: str | Path) -> Path:
    return (document.path.parent / Path(name).expanduser()).resolve()


def _with_paths(document: Document, host: HostConfig) -> HostConfig:
    if host.spill_directory is None:
        return host
    return replace(host, spill_directory=_resolve(document, host.spill_directory))


def _check_device(document: Document, device: DeviceConfig) -> None:
    if device.kind == "host" and device.memory is None:
        raise document.error(("device",), 'kind = "host" needs the memory to serve from, like memory = "2GiB"')
    if device.kind == "cuda":
        for key in ("link_bandwidth", "link_latency", "copy_threads"):
            if key in document.data["device"]:
                raise document.error(("device", key), f'{key} belongs to kind = "host", which emulates a link')
    page, chunk = device.page_size, device.chunk_size
    if page is not None and page & (page - 1):
        raise document.error(("device", "page_size"), f"page_size: {page} bytes is not a power of two")
    if page is not None and chunk is not None and chunk > page:
        raise document.error(("device", "chunk_size"), "chunk_size must not exceed page_size")
    if page is not None and device.memory is not None and device.memory < page:
        raise document.error(("device", "memory"), "memory is less than one page (page_size)")


def _check_scheduler(document: Document, scheduler: SchedulerConfig) -> None:
    if scheduler.policy not in POLICIES:
        known = suggestion(scheduler.policy, POLICIES, "choose from ")
        raise document.error(("scheduler", "policy"), f'unknown policy "{scheduler.policy}"{known}')
