"""`specgen distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def distill(
    model: Annotated[str, typer.Argument(help="Folder or name of the target.")],
    output: Annotated[Path, typer.Argument(help="Where the drafter goes.")],
    recipe: Annotated[Path | None, typer.Option(help="TOML file; see the plugin's README.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where corpus, states and the run are kept; default: OUTPUT/work.")
    ] = None,
    dtype: Annotated[str, typer.Option(help='The target\'s data type, such as "bfloat16".')] = "auto",
    smoke: Annotated[bool, typer.Option("--smoke", help="A run of a minute, to see that it works.")] = False,
) -> None:
    """Train a drafter for a model, an EAGLE-3 head or a draft model of some of its layers, with nothing but the model.

    It writes its own training text, its states are cached on disk, and a run that was cut off goes on where it
    stopped.
    """
    from rich.progress import Progress

    from specgen import Engine
    from specgen_eagle import distill as run
    from specgen_eagle.recipe import SMOKE, Recipe, read_recipe

    chosen = SMOKE if smoke else read_recipe(recipe) if recipe else Recipe()
    tokens = chosen.corpus.batch * (chosen.corpus.turn_tokens + chosen.corpus.answer_tokens + 512)
    with (
        Engine.from_pretrained(model, dtype=dtype, max_num_seqs=chosen.corpus.batch, kv_tokens=tokens) as engine,
        Progress() as progress,
    ):
        tasks: dict[str, int] = {}

        def told(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done)  # type: ignore[arg-type]

        curve = run.distill(engine, output, work or output / "work", chosen, told)
    run.plot(curve, output / "curve.png")
    last = curve[-1]
    shares = ", ".join(f"{share:.3f}" for share in last.survival)
    typer.echo(f"{output}: chains right on text held out, by length: {shares}")
