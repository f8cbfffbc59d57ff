"""`specgen doctor`: what a model would run on, part by part, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from specgen.cli.options import Device, Dtype, Model
from specgen.cli.terminal import note, quiet_libraries, write
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
    quiet_libraries()
    from specgen.api import Engine
    from specgen.model.demo import demo_model
    from specgen.model.selection import selection

    version()
    with Engine.from_pretrained(
        model or demo_model(progress=note), dtype=dtype, device=device, kv_format=kv_format, drafters=[]
    ) as engine:
        choices = selection(engine.target)
    part, chosen = (
        max(len(text) for text in side) for side in zip(*((c.part, c.chosen) for c in choices), strict=True)
    )
    for choice in choices:
        write(f"{choice.part:{part}}  {choice.chosen:{chosen}}  {choice.why}")
