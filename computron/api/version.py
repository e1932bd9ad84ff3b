"""Which Computron this is."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """Of the distribution; "unknown" where Computron runs from a folder that was never installed."""
    try:
        return metadata.version("computron")
    except metadata.PackageNotFoundError:
        return "unknown"
