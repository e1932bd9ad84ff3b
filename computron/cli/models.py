"""The commands for the models of a running server."""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from computron.cli.output import errors, fail, output

app = typer.Typer(no_args_is_help=True, help="List, load and unload the models of a running server.")

Url = Annotated[
    str, typer.Option("--url", envvar="COMPUTRON_URL", help="Address of the server; http:// may be left out.")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="COMPUTRON_API_KEY", help="Its API key, if it asks.")]
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command("list")
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


@app.command("load")
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


@app.command("unload")
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
