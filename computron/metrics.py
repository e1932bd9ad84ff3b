"""Prometheus metrics under their fixed names, in base units, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SWAP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)


class ModelFigures(Protocol):
    """One model at one moment. `resident_ratio`: share of its pages on the device, 0 to 1."""

    @property
    def model(self) -> str: ...
    @property
    def resident_ratio(self) -> float: ...
    @property
    def queue_depth(self) -> int: ...


class DeviceFigures(Protocol):
    """One node's memory at one moment, in bytes by state; transfers, swaps and seconds are counted since its start.

    `swaps`: swap-ins by how they ended: done, failed or cancelled.
    """

    @property
    def device_memory(self) -> Mapping[str, int]: ...
    @property
    def host_memory(self) -> Mapping[str, int]: ...
    @property
    def pages_shared(self) -> int: ...
    @property
    def transfer_bytes(self) -> int: ...
    @property
    def swaps(self) -> Mapping[str, int]: ...
    @property
    def link_busy_seconds(self) -> float: ...
    @property
    def host_pages_on_disk(self) -> int: ...


class NodeFigures(Protocol):
    """The models and the nodes, by rank, that serve them. `recoveries`: times that the group was formed anew.

    `frames` of `page_bytes` each: what every node's device is cut into. `stages`: of the pipeline. 0: not known yet.
    """

    @property
    def models(self) -> Sequence[ModelFigures]: ...
    @property
    def nodes(self) -> Mapping[int, DeviceFigures]: ...
    @property
    def missing_nodes(self) -> int: ...
    @property
    def recoveries(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def stages(self) -> int: ...


class Metrics:
    """What happened, told by whoever saw it; what is now, read at each scrape from the snapshot given to `watch`.

    Model names must come from the configuration, never from a client: each one is a label for good.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "computron_requests", "Requests that have ended: ok, error, rejected, cancelled or invalid", "outcome"
        )
        self._evictions = self._counter("computron_evictions", "Evictions ordered, by reason", "reason")
        self._evicted_pages = self._counter("computron_evicted_pages", "Pages that evictions unmapped", "reason")
        self._request_seconds = self._histogram(
            "computron_request_seconds", "From a request's arrival to its end", REQUEST_BUCKETS
        )
        self._first_token = self._histogram(
            "computron_time_to_first_token_seconds", "From a request's arrival to its first token", REQUEST_BUCKETS
        )
        self._inter_token = self._histogram(
            "computron_inter_token_seconds", "Between two outputs of one request", TOKEN_BUCKETS
        )
        self._batch_size = self._histogram("computron_batch_size", "Requests in one step", BATCH_BUCKETS)
        self._step_seconds = self._histogram(
            "computron_step_seconds", "Time in which a step computed, beside waiting for pages", TOKEN_BUCKETS
        )
        self._swap_ins = self._counter("computron_swap_ins", "Swap-ins after which all of the model was there")
        self._swap_seconds = self._histogram(
            "computron_swap_in_seconds", "Length of a piece of a swap-in", SWAP_BUCKETS
        )
        self._swap_hidden = self._histogram(
            "computron_swap_hidden_ratio", "Share of such a piece during which the device computed", SHARE_BUCKETS
        )
        self._swap_bytes = self._counter("computron_swap_in_bytes", "Bytes that swap-ins brought")

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> _ModelHistogram:
        return _ModelHistogram(Histogram(name, help_text, ["model"], buckets=buckets, registry=self.registry))

    def _counter(self, name: str, help_text: str, *labels: str) -> _LabelledCounter:
        return _LabelledCounter(Counter(name, help_text, ["model", *labels], registry=self.registry))

    def request_finished(self, model: str, outcome: str, seconds: float) -> None:
        """A request that was queued is over. `outcome`: ok, error, rejected or cancelled."""
        self._requests.add(1, model, outcome)
        self._request_seconds.observe(model, seconds)

    def request_refused(self, model: str) -> None:
        """A request was wrong and was never queued."""
        self._requests.add(1, model, "invalid")

    def first_token(self, model: str, seconds: float) -> None:
        self._first_token.observe(model, seconds)

    def inter_token(self, model: str, seconds: float) -> None:
        self._inter_token.observe(model, seconds)

    def step(self, model: str, size: int, seconds: float) -> None:
        """A step of `size` requests has ended, which computed for `seconds` beside waiting for pages."""
        self._batch_size.observe(model, size)
        self._step_seconds.observe(model, seconds)

    def swap_finished(self, model: str, seconds: float, hidden_ratio: float, nbytes: int) -> None:
        """A piece of a swap-in is there. `hidden_ratio`: share of its `seconds` in which the device computed."""
        self._swap_seconds.observe(model, seconds)
        self._swap_hidden.observe(model, hidden_ratio)
        self._swap_bytes.add(nbytes, model)

    def swap_in_completed(self, model: str) -> None:
        """All of the model is there."""
        self._swap_ins.add(1, model)

    def eviction(self, model: str, reason: str, pages: int) -> None:
        self._evictions.add(1, model, reason)
        self._evicted_pages.add(pages, model, reason)

    def watch(self, snapshot: Callable[[], NodeFigures]) -> None:
        """Take the gauges from this at every scrape."""
        self.registry.register(_SnapshotCollector(snapshot))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format, of `CONTENT_TYPE`."""
        return generate_latest(self.registry)


# prometheus_client's own lookup of a child by its labels costs more than the update itself, so children are kept.


class _LabelledCounter:
    __slots__ = ("_children", "_counter")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._children: dict[tuple[str, ...], Counter] = {}

    def add(self, amount: float, *labels: str) -> None:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self._counter.labels(*labels)
        child.inc(amount)


class _ModelHistogram:
    __slots__ = ("_children", "_histogram")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._children: dict[str, Histogram] = {}

    def observe(self, model: str, value: float) -> None:
        child = self._children.get(model)
        if child is None:
            child = self._children[model] = self._histogram.labels(model)
        child.observe(value)


class _SnapshotCollector(Collector):
    def __init__(self, snapshot: Callable[[], NodeFigures]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []  # nothing to take a snapshot for at registration

    def collect(self) -> Iterator[Metric]:
        figures = self._snapshot()
        depth = GaugeMetricFamily("computron_queue_depth", "Requests waiting to be started", labels=["model"])
        resident = GaugeMetricFamily(
            "computron_model_resident_ratio", "Share of the model's pages on the device", labels=["model"]
        )
        for model in figures.models:
            depth.add_metric([model.model], model.queue_depth)
            resident.add_metric([model.model], model.resident_ratio)
        yield depth
        yield resident
        yield from _node_metrics(figures.nodes)
        yield GaugeMetricFamily(
            "computron_device_frames", "Pages that the device of each node has room for", value=figures.frames
        )
        yield GaugeMetricFamily("computron_page_bytes", "Size of a page, and of a frame", value=figures.page_bytes)
        yield GaugeMetricFamily(
            "computron_pipeline_stages", "Stages that the models are split into", value=figures.stages
        )
        yield GaugeMetricFamily(
            "computron_nodes_missing", "Nodes of the group that are not there", value=figures.missing_nodes
        )
        yield CounterMetricFamily(
            "computron_group_recoveries", "Times that the group was formed anew", value=figures.recoveries
        )


def _node_metrics(nodes: Mapping[int, DeviceFigures]) -> Iterator[Metric]:
    device = GaugeMetricFamily("computron_device_memory_bytes", "Device memory by use", labels=["node", "state"])
    host = GaugeMetricFamily("computron_host_memory_bytes", "Host store by use", labels=["node", "state"])
    moved = CounterMetricFamily("computron_transfer_bytes", "Bytes moved to the device", labels=["node"])
    busy = CounterMetricFamily(
        "computron_link_busy_seconds", "Time in which the link to the device moved pages", labels=["node"]
    )
    swaps = CounterMetricFamily(
        "computron_swaps", "Pieces of swap-ins that have ended: done, failed or cancelled", labels=["node", "outcome"]
    )
    for rank, node in nodes.items():
        label = str(rank)
        for state, nbytes in node.device_memory.items():
            device.add_metric([label, state], nbytes)
        for state, nbytes in node.host_memory.items():
            host.add_metric([label, state], nbytes)
        moved.add_metric([label], node.transfer_bytes)
        busy.add_metric([label], node.link_busy_seconds)
        for outcome, count in node.swaps.items():
            swaps.add_metric([label, outcome], count)
    yield from (device, host, moved, busy, swaps)
    yield GaugeMetricFamily(
        "computron_host_pages_on_disk",
        "Pages of the host store that are on disk, its budget being full",
        value=sum(node.host_pages_on_disk for node in nodes.values()),
    )
    yield CounterMetricFamily(
        "computron_pages_shared",
        "Pages that need no storage of their own",
        value=sum(node.pages_shared for node in nodes.values()),
    )
