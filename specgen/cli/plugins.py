"""`specgen plugins`: who offers what."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specgen.cli.terminal import quiet_libraries, write

if TYPE_CHECKING:
    from specgen.plugins.manager import PluginInfo, Plugins


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the plugins and what each one offers.

    With versions, hooks, and the reason where one was not loaded.
    """
    from specgen.cli.extensions import extensions
    from specgen.plugins.manager import load_plugins

    quiet_libraries()
    found = load_plugins()
    offers = _offers(found)
    for name, extension in extensions(found.info(), own=()).items():
        offers.setdefault(str(extension.plugin), {}).setdefault("commands", []).append(name)
    listed = [{**asdict(info), "offers": offers.get(str(info), {})} for info in found.info()]
    if not as_json:
        return write("\n".join(_lines(info, offers.get(str(info), {})) for info in found.info()))
    import msgspec

    write(msgspec.json.format(msgspec.json.encode(listed), indent=2).decode())


def _offers(found: Plugins) -> dict[str, dict[str, list[str]]]:
    """Plugin -> hook -> the names it offers there."""
    from specgen.plugins import hookspecs

    anything: Any = found  # `collect` is typed for each hook that there is today
    offers: dict[str, dict[str, list[str]]] = {}
    for hook in found.hooks:
        if not str(inspect.signature(getattr(hookspecs, hook)).return_annotation).startswith("Mapping"):
            continue
        for name in anything.collect(hook):
            offers.setdefault(found.provenance(hook, name), {}).setdefault(hook, []).append(name)
    return offers


def _lines(info: PluginInfo, offers: dict[str, list[str]]) -> str:
    lines = [str(info)]
    if info.error:
        lines.append(f"  not loaded: {info.error}")
    lines += [f"  hooks: {', '.join(info.hooks)}"] if info.hooks else []
    lines += [f"  {kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in offers.items()]
    return "\n".join(lines)
