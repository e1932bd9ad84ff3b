"""The commands that run a master or an aggregator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from computron._toml import Duration, Size, convert
from computron.cli.output import ASKED_WRONGLY, errors, fail
from computron.errors import ComputronError

LogLevel = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="From which level on.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="COMPUTRON_API_KEY", help="The key that everybody has to show, where there is one.")
]
ServiceKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="COMPUTRON_SERVICE_KEY",
        help="By which the master and aggregators know each other.",
        show_default="in a file beside the master's log",
    ),
]
DEFAULT_LOG = Path("parameter-service.log")


def master(
    log: Annotated[Path, typer.Option(help="File in which the master keeps what must outlive it.")] = DEFAULT_LOG,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8470,
    aggregators: Annotated[
        str, typer.Option(help="`MIN:MAX` aggregators.", show_default="1:number of cores")
    ] = f"1:{os.cpu_count() or 1}",
    external: Annotated[
        bool, typer.Option("--external", help="Somebody else starts the aggregators: see /v1/wanted.")
    ] = False,
    memory: Annotated[str, typer.Option(help="Of each aggregator, for blocks and gradients.")] = "1GiB",
    snapshots: Annotated[
        Path | None, typer.Option(help="Folder of snapshots and versions, the same for all aggregators.")
    ] = None,
    packer: Annotated[
        Literal["utilisation", "cyclic"], typer.Option(help="How jobs share aggregators.")
    ] = "utilisation",
    interval: Annotated[str, typer.Option(help="Between two looks at the jobs' losses.")] = "5s",
    hysteresis: Annotated[str, typer.Option(help="How long an aggregator must have been dispensable.")] = "30s",
    idle: Annotated[str, typer.Option(help="After which a job without workers gives its memory back.")] = "10min",
    max_job_memory: Annotated[str | None, typer.Option(help="What one job may have.", show_default="no limit")] = None,
    key: ServiceKey = None,
    api_key: ApiKey = None,
    log_level: LogLevel = "info",
) -> None:
    """Run the master: it assigns jobs to aggregators, and starts aggregators on this machine.

    SIGINT and SIGTERM end it alone: aggregators go on, and the next master with the same --log takes over.

    Examples:

        computron parameter-service master --snapshots snapshots

        computron parameter-service master --host 0.0.0.0 --external --aggregators 1:20
    """
    from computron.api.logs import set_up_logging  # here: these take long to load, which `computron --help` should not
    from computron.parameter_service.master.key import key_path
    from computron.parameter_service.master.scaling import ScalingSettings
    from computron.parameter_service.master.server import MasterSettings, run
    from computron.parameter_service.master.state import Limits

    minimum, maximum = _range(aggregators)
    settings = MasterSettings(
        log=log,
        host=host,
        port=port,
        packer=packer,
        api_key=api_key,
        scaling=ScalingSettings(
            minimum, maximum, _seconds("--interval", interval), _seconds("--hysteresis", hysteresis), not external
        ),
        limits=Limits(
            idle=_seconds("--idle", idle),
            max_job_memory=None if max_job_memory is None else _size("--max-job-memory", max_job_memory),
        ),
        snapshots=None if snapshots is None else snapshots.resolve(),
        aggregator_memory=_size("--memory", memory),
        key=key,
    )
    set_up_logging(log_level, "text")

    def ready(url: str) -> None:
        errors.print(f"the master is at {url}")
        if external and key is None:
            errors.print(f"aggregators need the key in {key_path(log)}: give it to them with COMPUTRON_SERVICE_KEY")

    try:
        run(settings, ready)
    except ComputronError as error:
        fail(error.message, error.exit_code)
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror}; choose another address with --host and --port")


def aggregator(
    master: Annotated[
        str, typer.Option(envvar="COMPUTRON_PARAMETER_SERVICE", help="URL of the master.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address at which workers of other machines find it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 0,
    memory: Annotated[str, typer.Option(help="For blocks and gradients: a size like 4GiB, or bytes.")] = "1GiB",
    snapshots: Annotated[Path | None, typer.Option(help="Folder of snapshots and versions.")] = None,
    identity: Annotated[str | None, typer.Option(help="Its name.", show_default="a new one")] = None,
    key: ServiceKey = None,
    api_key: ApiKey = None,
    log_level: LogLevel = "info",
) -> None:
    """Run one aggregator: a process with one compute thread that holds parameters and applies optimizers.

    Example:

        export COMPUTRON_SERVICE_KEY=$(ssh 10.0.0.5 cat parameter-service.log.key)

        computron parameter-service aggregator --master http://10.0.0.5:8470 --host 10.0.0.7 --memory 8GiB
    """
    if not key:
        fail(
            "the service's key is missing: give it with COMPUTRON_SERVICE_KEY; the master keeps it beside its log",
            ASKED_WRONGLY,
        )
    from computron.api.logs import set_up_logging
    from computron.parameter_service.aggregator.process import AggregatorSettings, run

    set_up_logging(log_level, "text")
    settings = AggregatorSettings(
        master=master if "://" in master else f"http://{master}",
        host=host,
        port=port,
        memory=int(memory) if memory.isdigit() else _size("--memory", memory),
        key=key,
        snapshots=snapshots,
        identity=identity,
        api_key=api_key,
    )
    try:
        run(settings)
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another address")


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    try:
        minimum, maximum = int(first), int(last if colon else first)
    except ValueError:
        fail(f'--aggregators: "{text}" is not like 1:4', ASKED_WRONGLY)
    if not 0 <= minimum <= maximum or maximum == 0:
        fail(f"--aggregators: {text}: the first number must be at least 0 and at most the second", ASKED_WRONGLY)
    return minimum, maximum


def _size(option: str, text: str) -> int:
    try:
        return int(convert(text, Size))
    except ValueError as error:
        fail(f"{option}: {error}", ASKED_WRONGLY)


def _seconds(option: str, text: str) -> float:
    try:
        return float(convert(text, Duration))
    except ValueError as error:
        fail(f"{option}: {error}", ASKED_WRONGLY)
