"""The commands that ask a running master, and tell it what to do."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from computron.cli.output import fail, output, wide
from computron.cli.parameter_service.client import DEFAULT_URL, ApiKey, Url, call, quoted
from computron.cli.parameter_service.tables import aggregators_table, jobs_table

LOOK_EVERY = 0.1  # seconds
Job = Annotated[str, typer.Argument(help="Name of the job.", show_default=False)]


def list_jobs(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show the jobs.

    Example:

        computron parameter-service jobs
    """
    wide.print(jobs_table(call(url, "GET", "/v1/jobs", api_key)["data"]))


def list_aggregators(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show the aggregators.

    Example:

        computron parameter-service aggregators
    """
    wide.print(aggregators_table(call(url, "GET", "/v1/aggregators", api_key)["data"]))


def list_versions(job: Job, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show the versions that a job has published.

    Example:

        computron parameter-service versions lm
    """
    table = Table("version", "step", "published", "file", box=None)
    for version in call(url, "GET", f"/v1/jobs/{quoted(job)}/versions", api_key)["data"]:
        when = datetime.fromtimestamp(version["created"], UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        table.add_row(version["id"], str(version["step"]), when, version["path"])
    wide.print(table)


def move(
    job: Job,
    to: Annotated[str, typer.Option(help="The aggregator that gets them.", show_default=False)],
    blocks: Annotated[str, typer.Option(help="Numbers like `0,3,4`, or `all`.")] = "all",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Move a job's blocks to an aggregator, at the next step and without stopping the job.

    Example:

        computron parameter-service move lm --blocks 0,1 --to aggregator-2
    """
    try:
        chosen = "all" if blocks == "all" else [int(block) for block in blocks.split(",")]
    except ValueError:
        fail(f'--blocks: "{blocks}" is not like 0,3,4', 2)
    moving = call(url, "POST", f"/v1/jobs/{quoted(job)}/move", api_key, {"blocks": chosen, "to": to})["moving"]
    if not moving:
        output.print(f"nothing is to be moved: these blocks are at {to}, or on their way there")
    else:
        output.print("1 block is on its way" if moving == 1 else f"{moving} blocks are on their way")


def drain(
    aggregator: Annotated[str, typer.Argument(help="Name of the aggregator.", show_default=False)],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it holds nothing any more.")] = 0.0,
) -> None:
    """Move everything away from an aggregator, and stop it then.

    Examples:

        computron parameter-service drain aggregator-2

        computron parameter-service drain aggregator-2 --wait 60
    """
    call(url, "POST", f"/v1/aggregators/{quoted(aggregator)}/drain", api_key)
    deadline = time.monotonic() + wait
    while wait and (blocks := _blocks_at(aggregator, url, api_key)):
        if time.monotonic() >= deadline:
            fail(f"{aggregator} still holds {blocks} blocks after {wait:g} s; it goes on being drained")
        time.sleep(LOOK_EVERY)
    output.print(f"{aggregator} is empty" if wait else f"{aggregator} is being drained")


def _blocks_at(aggregator: str, url: str, api_key: str | None) -> int:
    known = call(url, "GET", "/v1/aggregators", api_key)["data"]
    return sum(sum(one["jobs"].values()) for one in known if one["id"] == aggregator)


def delete(job: Job, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Forget a job; its snapshots and versions stay on the disk.

    Example:

        computron parameter-service delete lm
    """
    call(url, "DELETE", f"/v1/jobs/{quoted(job)}", api_key)
    output.print(f"{job} is deleted")
