"""A live table of aggregators and jobs."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from computron.cli.output import wide
from computron.cli.parameter_service.client import DEFAULT_URL, ApiKey, MasterAway, Url, call, request
from computron.cli.parameter_service.tables import aggregators_table, jobs_table

PATHS = ("/v1/aggregators", "/v1/jobs", "/v1/wanted")


def top(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    once: Annotated[
        bool, typer.Option("--once", help="Show it once and end, as is done where the output is no terminal.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Watch aggregators and jobs: utilisation, memory, steps, losses against their limits, migrations, lost steps.

    Ends with Ctrl-C; a master that is away is waited for.

    Examples:

        computron parameter-service top

        computron parameter-service top --once --url http://10.0.0.5:8470
    """
    first = _picture(*(call(url, "GET", path, api_key) for path in PATHS))
    if once or not wide.is_terminal:
        wide.print(first)
        return
    with Live(first, console=wide, auto_refresh=False, screen=True) as live:
        try:
            while True:
                time.sleep(interval)
                live.update(_look(url, api_key), refresh=True)
        except KeyboardInterrupt:
            return


def _look(url: str, api_key: str | None) -> RenderableType:
    try:
        return _picture(*(request(url, "GET", path, api_key) for path in PATHS))
    except MasterAway as error:
        return Text(f"{error}; waiting for it", style="bold red")


def _picture(aggregators: dict[str, Any], jobs: dict[str, Any], wanted: dict[str, Any]) -> Group:
    count, there = wanted["aggregators"], wanted["connected"]
    head = f"{there} of {count} aggregators, {len(jobs['data'])} jobs"
    return Group(Text(head, style="bold"), aggregators_table(aggregators["data"]), Text(""), jobs_table(jobs["data"]))
