"""`specgen version` and `specgen --version`: what an issue report should say."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import typer

from specgen import __version__
from specgen.cli.terminal import write

_PACKAGES = ("torch", "transformers", "triton")


def version() -> None:
    """Print the versions that a report should name."""
    write(f"specgen {__version__}")
    for name in _PACKAGES:
        write(f"{name} {_installed(name)}")
    write(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")


def print_version(wanted: bool) -> None:
    """The callback of `--version`."""
    if wanted:
        write(f"specgen {__version__}")
        raise typer.Exit


def _installed(name: str) -> str:
    """Read from the metadata: importing torch would take seconds."""
    try:
        return installed(name)
    except PackageNotFoundError:
        return "is not installed"
