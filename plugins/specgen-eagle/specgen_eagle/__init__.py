"""EAGLE-3 heads for specgen: the drafter "eagle", and the command `specgen distill` that trains heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from specgen import DrafterFactory, DrafterSetup, hookimpl, takes_options
from specgen_eagle.options import EagleOptions

if TYPE_CHECKING:
    import typer

    from specgen import Drafter


@takes_options(EagleOptions)
def _eagle(setup: DrafterSetup) -> Drafter:
    from specgen_eagle.factory import eagle

    return eagle(setup)


@hookimpl
def drafters() -> Mapping[str, DrafterFactory]:
    """Offer "eagle"."""
    return {"eagle": _eagle}


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add `specgen distill`."""
    from specgen_eagle.command import distill

    cli.command()(distill)
