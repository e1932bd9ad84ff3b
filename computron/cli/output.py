"""What commands say: results on standard output, errors as one line on standard error."""

from __future__ import annotations

import os
from typing import NoReturn

import typer
from rich.console import Console

WIDTH = 120  # of tables that go into a file or a pipe

errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)
wide = Console(highlight=False, width=None if output.is_terminal or "COLUMNS" in os.environ else WIDTH)

ASKED_WRONGLY = 2


def fail(message: str, code: int = 1) -> NoReturn:
    errors.print("[bold red]error:[/] ", end="")
    errors.print(message, markup=False)
    raise typer.Exit(code)
