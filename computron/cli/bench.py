"""The commands that measure a running server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from computron.cli.models import DEFAULT_URL, ApiKey, Url
from computron.cli.output import ASKED_WRONGLY, errors, fail, output
from computron.errors import ComputronError

if TYPE_CHECKING:
    from computron.profiling.link import MeasuredLink
    from computron.profiling.measuring import Measured
    from computron.profiling.steps import MeasuredSteps

app = typer.Typer(no_args_is_help=True, help="Measure a running server.")


@app.command("profile")
def profile(
    out: Annotated[Path, typer.Option("--out", help="The profile, to be written.", show_default=False)],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    models: Annotated[str | None, typer.Option(help="Only these: `a,b`.", show_default="all")] = None,
    seconds: Annotated[
        float,
        typer.Option(min=0.0, help="About how long the steps of each model are measured, but at least three rounds."),
    ] = 20,
    pause: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Rest before each call, in seconds: as between requests to the server that is to be simulated.",
        ),
    ] = 0.1,
    body: Annotated[
        list[str] | None,
        typer.Option(help="`MODEL=FILE.json`: a request to a custom model, may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Measure a server's link, steps and overheads, for `computron simulate --profile`.

    The server must be idle: its models are called, unloaded and loaded. What is measured is what this client sees, the
    network to it included.

    Examples:

        computron bench profile --out profile.json

        computron bench profile --url gpu-a:8000 --models chat,search --seconds 60 --out gpu-a.json

        computron bench profile --models echo --body echo=request.json --out echo.json
    """
    from computron.profiling.measuring import measure
    from computron.profiling.server import Server

    names = [name.strip() for name in models.split(",")] if models is not None else []
    bodies = dict(_body(given) for given in body or ())
    if not out.absolute().parent.is_dir():
        fail(f"there is no folder {out.parent} to write {out.name} to", ASKED_WRONGLY)
    if out.is_dir():
        fail(f"{out} is a folder: say which file to write", ASKED_WRONGLY)
    for name, value in (("--seconds", seconds), ("--pause", pause)):
        if not math.isfinite(value):
            fail(f"{name} must be a number", ASKED_WRONGLY)

    async def run() -> Measured:
        async with Server(url, api_key) as server:
            return await measure(
                server,
                models=names,
                seconds=seconds,
                pause=pause,
                bodies=bodies,
                progress=lambda what: errors.print(what),
            )

    try:
        measured = asyncio.run(run())
        measured.profile.write(out)
    except ComputronError as error:
        fail(error.message)
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror}")
    for table in tables(measured):
        output.print(table)
    if missed := misfits(measured):
        errors.print(
            f"warning: the fit misses by more than {MISS:.0%} for {', '.join(missed)}: "
            "the machine was busy or the server was: measure again",
            markup=False,
        )
    output.print(f"written to {out}")


def _body(given: str) -> tuple[str, Any]:
    model, equals, path = given.partition("=")
    if not equals or not model:
        fail(f'--body takes MODEL=FILE.json, not "{given}"', ASKED_WRONGLY)
    try:
        return model, json.loads(Path(path).read_bytes())
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}", ASKED_WRONGLY)
    except ValueError as error:
        fail(f"{path} is no JSON: {error}", ASKED_WRONGLY)


MISS = 0.2  # how far a fit may be off before a warning


def misfits(measured: Measured) -> list[str]:
    """What the profile would foretell badly."""
    missed = [f"the steps of {model}" for model, steps in measured.steps.items() if steps.fitted.worst_error > MISS]
    return missed + (["the link"] if max(map(abs, measured.link.errors)) > MISS else [])


def tables(measured: Measured) -> Sequence[Table]:
    """What was measured, and how well what was fitted foretells it."""
    return [
        _link(measured.link),
        *(_steps(model, steps) for model, steps in measured.steps.items()),
        _found(measured),
    ]


def _link(measured: MeasuredLink) -> Table:
    table = Table("load of", "size", "pieces", "time", "bandwidth", "fit", title="Link", title_justify="left", box=None)
    for load, error in zip(measured.loads, measured.errors, strict=True):
        table.add_row(
            load.model,
            f"{load.nbytes / 2**20:.1f} MiB",
            str(load.swaps),
            _time(load.seconds),
            f"{load.nbytes / load.seconds / 1e9:.2f} GB/s",
            f"{error:+.1%}",
        )
    return table


def _steps(model: str, measured: MeasuredSteps) -> Table:
    title = f"Steps of {model}, {measured.discarded} of {measured.made} calls discarded"
    table = Table("call", "steps", "compute", "calls", "fit", title=title, title_justify="left", box=None)
    for call, error in zip(measured.calls, measured.fitted.errors, strict=True):
        table.add_row(call.name, str(call.work.steps), _time(call.seconds), str(call.repeats), f"{error:+.1%}")
    return table


def _found(measured: Measured) -> Table:
    hardware = measured.profile.hardware
    table = Table("what", "", title="Profile", title_justify="left", box=None, show_header=False)
    table.add_row("link", f"{hardware.link.bandwidth / 1e9:.3f} GB/s, {_time(hardware.link.latency)}")
    table.add_row("device", f"{hardware.frames} frames of {hardware.frame_bytes / 2**20:g} MiB")
    overhead = hardware.request_overhead + hardware.answer_overhead
    table.add_row("beside steps", f"{_time(overhead)} a call, {_time(hardware.step_overhead)} a step")
    for model in measured.profile.models:
        step, fitted = model.step, measured.steps[model.name].fitted
        terms = [_time(step.base)]
        terms += [f"{_time(step.opening)} if it takes in a prompt"] if step.opening else []
        terms += [
            f"{_time(seconds)} a {what}"
            for what, seconds in (
                ("prompt token", step.per_prompt_token),
                ("request", step.per_sequence),
                ("cached token", step.per_context_token),
            )
            if seconds
        ]
        fit = f"fit within {fitted.typical_error:.1%} typically, {fitted.worst_error:.1%} at worst"
        table.add_row(f"step of {model.name}", f"{' + '.join(terms)} ({fit})")
    return table


def _time(seconds: float) -> str:
    """In the unit that suits: 4.65 ms, 12.3 us."""
    if seconds >= 1.0:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 or not seconds else f"{seconds * 1e6:.3g} us"
