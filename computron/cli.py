"""Commands. Errors are one line on standard error; exit code 1: it failed, 2: it was asked wrongly."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from computron.api.version import installed_version
from computron.config import Config, load_config, with_place
from computron.errors import ComputronError
from computron.group.supervisor import RESTARTS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Serve many models from little GPU memory.",
)
models_app = typer.Typer(no_args_is_help=True, help="List, load and unload the models of a running server.")
app.add_typer(models_app, name="models")

errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)

Url = Annotated[
    str, typer.Option("--url", envvar="COMPUTRON_URL", help="Address of the server; http:// may be left out.")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="COMPUTRON_API_KEY", help="Its API key, if it asks.")]
DEFAULT_URL = "http://127.0.0.1:8000"


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


def fail(message: str, code: int = 1) -> NoReturn:
    errors.print("[bold red]error:[/] ", end="")
    errors.print(message, markup=False)
    raise typer.Exit(code)


@app.command()
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


@app.command()
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


@models_app.command("list")
def list_models(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show each model, its size and how much of it is on the device.

    Example:

        computron models list --url http://127.0.0.1:8000
    """
    table = Table("model", "task", "state", "size", "resident", "waiting", "running", box=None)
    for model in call(url, "GET", "/v1/models", api_key)["data"]:
        table.add_row(
            model["id"] + (" (pinned)" if model["pinned"] else ""),
            model["task"],
            model["state"],
            f"{model['bytes'] / 2**20:.1f} MiB",
            f"{model['resident_ratio']:.0%}",
            str(model["queue_depth"]),
            str(model["running"]),
        )
    output.print(table)


@models_app.command("load")
def load_model(
    model: Annotated[str, typer.Argument(help="Id of the model.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it is there.")] = 60.0,
) -> None:
    """Bring a model to the device, as soon as nothing more urgent needs the room.

    Example:

        computron models load smollm2-135m
    """
    path = f"/v1/models/{urllib.parse.quote(model)}"
    state = call(url, "POST", f"{path}/load", api_key)
    deadline = time.monotonic() + wait
    with Progress(TextColumn("{task.description}"), BarColumn(), console=errors, transient=True) as progress:
        bar = progress.add_task(model, total=1.0)
        while state["resident_ratio"] < 1 and time.monotonic() < deadline:
            time.sleep(0.1)
            state = call(url, "GET", path, api_key)
            progress.update(bar, completed=state["resident_ratio"])
    if state["resident_ratio"] < 1:
        share = f"{state['resident_ratio']:.0%}"
        fail(f"{model} is {share} on the device after {wait:g} s: others need the room; it stays asked for")
    output.print(f"{model} is on the device")


@models_app.command("unload")
def unload_model(
    model: Annotated[str, typer.Argument(help="Id of the model.")], url: Url = DEFAULT_URL, api_key: ApiKey = None
) -> None:
    """Take a model off the device as soon as it is idle; it is still served.

    Example:

        computron models unload smollm2-135m
    """
    state = call(url, "POST", f"/v1/models/{urllib.parse.quote(model)}/unload", api_key)
    gone = state["resident_ratio"] == 0
    output.print(f"{model} is off the device" if gone else f"{model} will leave the device as soon as it is idle")


@app.command()
def version() -> None:
    """Show the version of Computron."""
    output.print(f"computron {installed_version()}")


def call(url: str, method: str, path: str, api_key: str | None) -> Any:
    """One request to a running server, its JSON answer. Exits with one line if that does not work."""
    if "://" not in url:
        url = f"http://{url}"
    request = urllib.request.Request(url.rstrip("/") + path, method=method)
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            said = _server_message(error.read(), f"{url} answered {error.code} {error.reason}")
        if error.code == 401:
            which = "an" if api_key is None else "another"
            said = f"{url} asks for {which} API key; give it with --api-key or COMPUTRON_API_KEY"
        fail(said)
    except urllib.error.URLError as error:
        fail(f"no server at {url}: {error.reason}; start one with `{_program()} serve`, or give its address with --url")
    except (OSError, ValueError) as error:
        fail(f"{url} is no Computron server: {error}")


def _program() -> str:
    """This command as it can be typed here, also outside an activated environment."""
    if shutil.which("computron") is not None:
        return "computron"
    return sys.argv[0] if Path(sys.argv[0]).name == "computron" else f"{sys.executable} -m computron"


def _server_message(body: bytes, otherwise: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return otherwise
