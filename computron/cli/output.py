"""What commands say: results on standard output, errors as one line on standard error."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)

ASKED_WRONGLY = 2


def fail(message: str, code: int = 1) -> NoReturn:
    errors.print("[bold red]error:[/] ", end="")
    errors.print(message, markup=False)
    raise typer.Exit(code)
