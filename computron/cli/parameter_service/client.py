"""Requests to a running master."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Annotated, Any

import typer

from computron.cli.output import fail

Url = Annotated[
    str,
    typer.Option("--url", envvar="COMPUTRON_PARAMETER_SERVICE", help="Address of the master; http:// may be left out."),
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="COMPUTRON_API_KEY", help="Its API key, if it asks.")]
DEFAULT_URL = "http://127.0.0.1:8470"
PATIENCE = 30.0  # seconds for an answer


class MasterAway(Exception):
    """Nobody answers there."""


def request(url: str, method: str, path: str, api_key: str | None, body: dict[str, Any] | None = None) -> Any:
    """The answer's JSON. Raises MasterAway; exits with one line on an answer that is an error."""
    if "://" not in url:
        url = f"http://{url}"
    asked = urllib.request.Request(url.rstrip("/") + path, method=method)
    if body is not None:
        asked.data = json.dumps(body).encode()
    if api_key is not None:
        asked.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            fail(_said(error.read(), f"{url} answered {error.code} {error.reason}"))
    except urllib.error.URLError as error:
        raise MasterAway(f"no master at {url}: {error.reason}") from error
    except ConnectionError as error:
        raise MasterAway(f"no master at {url}: {error}") from error
    except (OSError, ValueError) as error:
        fail(f"{url} is no master: {error}")


def call(url: str, method: str, path: str, api_key: str | None, body: dict[str, Any] | None = None) -> Any:
    """As `request`, but exits with one line also if nobody answers."""
    try:
        return request(url, method, path, api_key, body)
    except MasterAway as error:
        fail(f"{error}; start one with `computron parameter-service master`, or give its address with --url")


def quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _said(body: bytes, otherwise: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return otherwise
