"""`specgen demo-model`: fetch a small real model."""

from __future__ import annotations

from specgen.cli.terminal import note, write


def demo_model() -> None:
    """Fetch the demo model and print its folder.

    The first call downloads 93 MB and writes 540 MB.
    """
    from specgen import demo_model as demo

    write(str(demo.demo_model(progress=note)))
