"""`specgen adapters`: which adapters a folder holds, and whether a model can run under them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from specgen.cli.loading import open_engine
from specgen.cli.options import AnyBase, Device, Dtype, Model
from specgen.cli.terminal import write

if TYPE_CHECKING:
    from specgen.api.engine import Engine

_CONFIG = "adapter_config.json"


def adapters(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapter's folder, or one that holds several.")],
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = None,
    any_base: AnyBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the LoRA adapters in a folder and load each one for the model.

    Says what is refused and why; then the exit code is 1.
    """
    folders = _folders(folder)
    with open_engine(model, dtype=dtype, device=device, draft_model=None, drafters="") as engine:
        checked = [_checked(engine, path, any_base) for path in folders]
    if as_json:
        import msgspec

        write(msgspec.json.format(msgspec.json.encode(checked), indent=2).decode())
    else:
        write("\n".join(map(_line, checked)))
    if any(one["error"] for one in checked):
        raise typer.Exit(1)


def _folders(folder: Path) -> list[Path]:
    from specgen.errors import InvalidRequest

    found = [path.parent for path in sorted([folder / _CONFIG, *folder.glob(f"*/{_CONFIG}")]) if path.is_file()]
    if not found:
        raise InvalidRequest(f"folder {str(folder)!r} holds no {_CONFIG}, nor does a folder in it", param="folder")
    return found


def _checked(engine: Engine, path: Path, any_base: bool) -> dict[str, object]:
    """What is said of one adapter."""
    from specgen.errors import InvalidRequest

    try:
        info = engine.adapters.load("checked", path, any_base=any_base)
        engine.adapters.unload("checked")
    except InvalidRequest as error:
        return {"folder": path.name, "error": str(error)}
    kept = ("revision", "base", "rank", "bytes")
    return {"folder": path.name, "error": None, **{name: asdict(info)[name] for name in kept}}


def _line(one: dict[str, object]) -> str:
    if one["error"]:
        return f"{one['folder']}\n  refused: {one['error']}"
    base = one["base"] or "a base without a name"
    return (
        f"{one['folder']} {one['revision']}\n  rank {one['rank']}, {cast(int, one['bytes']) / 1e6:.1f} MB, for {base}"
    )
