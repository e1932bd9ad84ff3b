"""The commands of the Parameter Service."""

from __future__ import annotations

import typer

from computron.cli.parameter_service import jobs, processes, top

app = typer.Typer(no_args_is_help=True, help="Aggregate many training jobs on few shared aggregators.")
app.command()(processes.master)
app.command()(processes.aggregator)
app.command()(top.top)
app.command("jobs")(jobs.list_jobs)
app.command("aggregators")(jobs.list_aggregators)
app.command("versions")(jobs.list_versions)
app.command("move")(jobs.move)
app.command("drain")(jobs.drain)
app.command("delete")(jobs.delete)
