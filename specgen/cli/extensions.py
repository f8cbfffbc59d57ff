"""The commands of plugins, each with the plugin that it comes from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from specgen.cli.terminal import quiet_libraries
from specgen.errors import DuplicateName, PluginError

if TYPE_CHECKING:
    from specgen.plugins.manager import PluginInfo

_HOOK = "register_commands"


@dataclass(frozen=True, slots=True)
class Extension:
    """A command and the plugin that registered it."""

    command: object
    plugin: PluginInfo


def installed(own: Collection[str]) -> dict[str, Extension]:
    """The commands of all installed plugins; see `extensions`."""
    from specgen.plugins.manager import load_plugins

    quiet_libraries()
    return extensions(load_plugins().info(), own)


def extensions(plugins: Iterable[PluginInfo], own: Collection[str]) -> dict[str, Extension]:
    """Name -> command over `plugins`.

    own: specgen's own commands. Raises PluginError where a plugin registers one of their names, DuplicateName where
    two plugins register one name.
    """
    found: dict[str, Extension] = {}
    for info in plugins:
        for name, command in _commands(info).items() if _HOOK in info.hooks else ():
            if name in own:
                raise PluginError(f"plugin {info}: command {name!r} is specgen's own; choose another name")
            if name in found:
                raise DuplicateName(f"command {name!r}: {found[name].plugin} and {info}")
            found[name] = Extension(command, info)
    return found


def _commands(info: PluginInfo) -> dict[str, object]:
    """What one plugin registers. It is loaded alone, so that every command has a known origin."""
    from specgen.plugins.manager import load_plugins

    group = typer.Typer(rich_markup_mode=None)
    # A callback makes it a group even if it holds a single command.
    group.callback()(lambda: None)
    load_plugins(only=[info.name]).call(_HOOK, cli=group)
    return dict(typer.main.get_group(group).commands)
