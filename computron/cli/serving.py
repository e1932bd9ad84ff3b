"""The commands that serve: one node, or a group of them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from computron.cli.output import errors, fail, output
from computron.config import Config, load_config, with_place
from computron.errors import ComputronError
from computron.group.supervisor import RESTARTS


def serve(
    config: Annotated[Path, typer.Argument(help="The configuration: models, memory, address.", show_default=False)],
    host: Annotated[str | None, typer.Option(help="Address to listen on, instead of the file's.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port, instead of the file's; 0: a free one.")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="Instead of the file's.")
    ] = None,
) -> None:
    """Serve the models of a configuration file until SIGINT or SIGTERM.

    The first signal lets open requests end (`server.drain_timeout`); the second ends at once.

    Examples:

        computron serve serve.toml

        computron serve serve.toml --host 0.0.0.0 --port 9000 --log-level debug
    """
    again = os.environ.get(RESTARTS, "0") != "0"  # then the group's leader shall hear what is missing
    try:
        settings = load_config(config, sources_exist=not again)
    except ComputronError as error:
        fail(error.message)
    given: dict[str, Any] = {"host": host, "port": port, "log_level": log_level}
    server = replace(settings.server, **{key: value for key, value in given.items() if value is not None})
    try:
        _run_server(replace(settings, server=server))
    except ComputronError as error:
        fail(with_place(config, error), error.exit_code)
    output.print("stopped")


def _run_server(config: Config) -> int:
    # Before torch is loaded. Its threads wait for each other at every operation; if they spin there, one other busy
    # process on the machine makes a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from computron.api.process import run  # here: it takes seconds, which `computron version` should not

    return run(config, lambda: LoadingDisplay(config))


def launch(
    config: Annotated[
        Path, typer.Argument(help="The configuration; `[group]` says how many nodes.", show_default=False)
    ],
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the whole group, to be checked against the file's.")
    ] = None,
    hosts: Annotated[str | None, typer.Option(help="All hosts, the leader's first: `a,b`. Without: this one.")] = None,
    host_rank: Annotated[int | None, typer.Option(min=0, help="Which of them this is, from 0.")] = None,
    rendezvous: Annotated[
        str | None, typer.Option(help="`HOST:PORT` of the leader for the other nodes.", show_default="first host:29500")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on for HTTP, instead of the file's.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port for HTTP, instead of the file's.")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="Instead of the file's.")
    ] = None,
) -> None:
    """Serve models from a whole group of nodes: run those of this host, and start them again when they die or hang.

    The sizes in the file, `device.memory` and `host.memory`, are those of **each node**. The first SIGINT or SIGTERM
    lets open requests end (`server.drain_timeout`); the second kills the nodes. Exit codes: 0 stopped in order, 1 it
    failed, 3 the configuration or a checkpoint is wrong.

    Examples:

        computron launch serve.toml

        computron launch serve.toml --hosts gpu-a,gpu-b --host-rank 0    # on gpu-a

        computron launch serve.toml --hosts gpu-a,gpu-b --host-rank 1    # on gpu-b
    """
    from computron.api.logs import set_up_logging
    from computron.group.launch import launch as launch_nodes
    from computron.group.launch import serve_command, share_of
    from computron.group.supervision import CANNOT_START

    try:
        settings = load_config(config)
    except ComputronError as error:
        fail(error.message, CANNOT_START)
    try:
        names = [name.strip() for name in hosts.split(",")] if hosts is not None else []
        share = share_of(settings.group.nodes, asked=nodes, hosts=names, host_rank=host_rank, rendezvous=rendezvous)
        set_up_logging(log_level or settings.server.log_level, settings.server.log_format)
        command = serve_command(config, {"host": host, "port": port, "log-level": log_level})
        code = launch_nodes(settings, share, command, libraries=["computron.api.process"])
    except ComputronError as error:
        fail(with_place(config, error) if error.param is not None else error.message, CANNOT_START)
    raise typer.Exit(code)


class LoadingDisplay:
    """A bar for each model that is being loaded, on a terminal; otherwise one line when all are."""

    def __init__(self, config: Config) -> None:
        self._began = time.monotonic()
        self._count = len(config.models)
        self._bytes: dict[str, int] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=errors,
            disable=not errors.is_terminal,
        )
        self._progress.start()

    def loading(self, model: str, done: int, total: int) -> None:
        if model not in self._bars:
            self._bars[model] = self._progress.add_task(model, total=total)
        self._bytes[model] = total
        self._progress.update(self._bars[model], completed=done, total=total)  # a group's grows as its nodes report

    def ready(self, url: str) -> None:
        self.close()
        size = sum(self._bytes.values()) / 2**20
        seconds = time.monotonic() - self._began
        models = "1 model" if self._count == 1 else f"{self._count} models"
        errors.print(f"{models} ({size:.0f} MiB) loaded in {seconds:.1f} s; serving at {url}")

    def close(self) -> None:
        self._progress.stop()
