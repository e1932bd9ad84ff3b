"""Jobs and aggregators, as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

UNKNOWN = "-"
EXPLAINED = ("gathering", "failed")  # states of which the reason is shown, too


def aggregators_table(aggregators: list[dict[str, Any]]) -> Table:
    table = Table("aggregator", "state", "utilisation", "memory", "jobs", "blocks", "pid", box=None)
    for known in aggregators:
        memory = f"{_mebibytes(known['memory_used'])} of {_mebibytes(known['memory'])}" if known["memory"] else UNKNOWN
        table.add_row(
            known["id"],
            known["state"],
            _share(known["utilisation"]),
            memory,
            ", ".join(known["jobs"]) or UNKNOWN,
            str(sum(known["jobs"].values())),
            str(known["pid"]),
        )
    return table


def jobs_table(jobs: list[dict[str, Any]]) -> Table:
    table = Table(
        "job", "state", "workers", "step", "steps/s", "iteration", "loss", "limit", "CPU", "blocks at", "moved", "lost",
        box=None,
    )  # fmt: skip
    for job in jobs:
        places = ", ".join(f"{name}: {count}" for name, count in job["aggregators"].items())
        if places and job["blocks_nowhere"]:
            places += f", {UNKNOWN}: {job['blocks_nowhere']}"
        table.add_row(
            job["id"],
            f"{job['state']}: {job['reason']}" if job["state"] in EXPLAINED else job["state"],
            str(len(job["workers"])),
            str(job["step"]),
            UNKNOWN if job["steps_per_second"] is None else f"{job['steps_per_second']:.2f}",
            UNKNOWN if job["iteration_seconds"] is None else f"{job['iteration_seconds'] * 1e3:.1f} ms",
            _loss(job["loss"], job["loss_limit"]),
            _share(job["loss_limit"]),
            f"{job['cpu_seconds']:.1f} s",
            places or UNKNOWN,
            f"{job['migrations']}" + (f" (+{job['moving']})" if job["moving"] else ""),
            str(job["lost_steps"]),
        )
    return table


def _loss(loss: float | None, limit: float) -> str:
    shown = _share(loss)
    return f"[bold red]{shown}[/]" if loss is not None and loss > limit else shown


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
