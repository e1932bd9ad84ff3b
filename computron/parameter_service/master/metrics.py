"""The master's metrics for Prometheus, made from its state at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from computron.metrics import CONTENT_TYPE
from computron.parameter_service.master.master import Master
from computron.parameter_service.master.views import aggregator_view, job_view

__all__ = ["CONTENT_TYPE", "exposition"]

PREFIX = "computron_ps_"
# Name, help, key of the view; counters end in _total by themselves.
JOB_GAUGES = (
    ("job_step", "Last step that was heard of", "step"),
    ("job_epoch", "Reconfigurations of the job", "epoch"),
    ("job_iteration_seconds", "From step to step, lately", "iteration_seconds"),
    ("job_compute_seconds", "Of an iteration, in which the slowest worker computes", "compute_seconds"),
    ("job_loss_ratio", "Share of an iteration lost against an aggregator of its own", "loss"),
    ("job_predicted_loss_ratio", "The same as the packer predicts it", "predicted_loss"),
    ("job_loss_limit_ratio", "What it may lose", "loss_limit"),
    ("job_memory_bytes", "Parameters and optimizer state", "memory"),
    ("job_moving_blocks", "Blocks on their way", "moving"),
)
JOB_COUNTERS = (
    ("job_cpu_seconds", "Compute thread time", "cpu_seconds"),
    ("job_late_seconds", "Past the deadlines, summed over steps", "late_seconds"),
    ("job_migrations", "Blocks moved", "migrations"),
    ("job_lost_steps", "Steps rolled back", "lost_steps"),
)
AGGREGATOR_GAUGES = (
    ("aggregator_utilisation_ratio", "Busy share of the compute thread", "utilisation"),
    ("aggregator_memory_bytes", "Memory in use", "memory_used"),
    ("aggregator_memory_limit_bytes", "Memory that it may use", "memory"),
)
JOB_STATES = ("failed", "gathering", "reconfiguring", "idle", "running")
AGGREGATOR_STATES = ("starting", "up", "draining", "stopping", "away")


def exposition(master: Master) -> bytes:
    """In Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(master))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, master: Master) -> None:
        self._master = master

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        master = self._master
        state = master.state
        yield GaugeMetricFamily(f"{PREFIX}aggregators_wanted", "How many there should be", value=master.scaling.wanted)
        yield CounterMetricFamily(
            f"{PREFIX}migrations", "Blocks moved since the master's start", value=state.migrations
        )
        yield CounterMetricFamily(
            f"{PREFIX}reconfigurations", "Epochs begun since the master's start", value=state.reconfigurations
        )
        yield CounterMetricFamily(
            f"{PREFIX}rollbacks", "Jobs put back to a snapshot since the master's start", value=state.rollbacks
        )
        jobs = [job_view(master, job) for _, job in sorted(state.jobs.items())]
        aggregators = [aggregator_view(master, known) for _, known in sorted(state.aggregators.items())]
        yield _states(f"{PREFIX}jobs", "Jobs by state", JOB_STATES, jobs)
        yield _states(f"{PREFIX}aggregators", "Aggregators by state", AGGREGATOR_STATES, aggregators)
        workers = GaugeMetricFamily(f"{PREFIX}job_workers", "Members", labels=["job"])
        for view in jobs:
            workers.add_metric([view["id"]], len(view["workers"]))
        yield workers
        for name, text, key in JOB_GAUGES:
            yield _family(GaugeMetricFamily(PREFIX + name, text, labels=["job"]), jobs, key)
        for name, text, key in JOB_COUNTERS:
            yield _family(CounterMetricFamily(PREFIX + name, text, labels=["job"]), jobs, key)
        for name, text, key in AGGREGATOR_GAUGES:
            yield _family(GaugeMetricFamily(PREFIX + name, text, labels=["aggregator"]), aggregators, key)
        cpu = CounterMetricFamily(f"{PREFIX}aggregator_cpu_seconds", "Of the whole process", labels=["aggregator"])
        yield _family(cpu, aggregators, "cpu_seconds")


Family = GaugeMetricFamily | CounterMetricFamily


def _family(family: Family, views: list[dict[str, object]], key: str) -> Family:
    for view in views:
        value = view[key]
        if isinstance(value, int | float):
            family.add_metric([str(view["id"])], value)
    return family


def _states(name: str, text: str, states: tuple[str, ...], views: list[dict[str, object]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["state"])
    for state in states:
        family.add_metric([state], sum(view["state"] == state for view in views))
    return family
