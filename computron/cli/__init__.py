"""Commands. Errors are one line on standard error; exit code 1: it failed, 2: it was asked wrongly."""

from __future__ import annotations

from typing import Annotated

import typer

from computron.api.version import installed_version
from computron.cli import bench, models, parameter_service, serving
from computron.cli.output import output
from computron.cli.simulation.command import simulate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Serve many models from little GPU memory.",
)


def main() -> None:
    """The `computron` command."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version of Computron.")
    ] = False,
) -> None:
    pass


def version() -> None:
    """Show the version of Computron."""
    output.print(f"computron {installed_version()}")


app.command()(serving.serve)
app.command()(serving.launch)
app.command()(simulate)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.add_typer(parameter_service.app, name="parameter-service")
app.command()(version)
