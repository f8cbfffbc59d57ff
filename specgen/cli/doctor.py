"""`specgen doctor`: what a model would run on, part by part, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from specgen.cli.loading import open_engine
from specgen.cli.options import Device, Dtype, Model
from specgen.cli.terminal import write
from specgen.cli.version import version


def doctor(
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = None,
    kv_format: Annotated[str, typer.Option(metavar="NAME", help="How keys and values are kept.")] = "native",
) -> None:
    """Load a model and say what does each part of its work, and why.

    A model that is refused says so as in any other command.
    """
    version()
    with open_engine(model, dtype=dtype, device=device, draft_model=None, drafters="", kv_format=kv_format) as engine:
        from specgen.model.report import selection

        choices = selection(engine.target)
    part, chosen = (
        max(len(text) for text in side) for side in zip(*((c.part, c.chosen) for c in choices), strict=True)
    )
    for choice in choices:
        write(f"{choice.part:{part}}  {choice.chosen:{chosen}}  {choice.why}")
