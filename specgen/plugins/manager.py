"""Finds plugins, checks them against the hooks and keeps account of which plugin offers what.

pluggy finds and collects; it decides no order. Nothing here is global: an engine holds the `Plugins` it was given.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal, overload

import pluggy

from specgen._base.log import Log
from specgen._base.version import __version__
from specgen.context.stage import ContextStageFactory
from specgen.draft.drafter import DrafterFactory
from specgen.errors import DuplicateName, PluginError, UnknownName
from specgen.kv.formats import KVFormatFactory
from specgen.plugins import builtin, hookspecs
from specgen.plugins.hookspecs import PROJECT
from specgen.sampling.constraint import ConstraintFactory
from specgen.types import LogitsProcessorFactory

ALLOW_LIST: Final = "SPECGEN_PLUGINS"
"""Environment variable: the distributions that may load, separated by commas. Empty: none; unset: all."""

_DISTRIBUTION = "specgen-llm"
_KINDS: Final[Mapping[str, str]] = {
    "constraints": "constraint",
    "context_stages": "context stage",
    "drafters": "drafter",
    "kv_formats": "KV format",
    "logits_processors": "logits processor",
}

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin as `specgen plugins` lists it. `name` and `version` are its distribution's; `error` says why it was
    not loaded."""

    name: str
    version: str = ""
    hooks: tuple[str, ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


class Plugins:
    """The plugins of one engine. Register everything before the engine is built; `notify` is the engine's thread's."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """Plugin name -> how often one of its observers raised."""
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._infos: dict[str, PluginInfo] = {}

    @property
    def hooks(self) -> tuple[str, ...]:
        """The names of all hooks that there are."""
        return tuple(name for name in dir(hookspecs) if self._manager.parse_hookspec_opts(hookspecs, name))

    def register(self, plugin: object, name: str, *, version: str = "") -> None:
        """Add a module or an object with hook implementations.

        Raises PluginError, naming the plugin, for an unknown hook, for an argument that the hook does not have, and
        for a name or an object that is registered already.
        """
        info = PluginInfo(name, version)
        if name in self._infos:
            raise PluginError(f"plugin {info}: {self._infos[name]} is registered under that name; one name, one plugin")
        try:
            self._manager.register(plugin, name)
            self._check(plugin)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            reason = " ".join(str(error).split())
            raise PluginError(f"plugin {info}: {reason}; hooks: {', '.join(self.hooks)}") from error
        found = self._manager.get_hookcallers(plugin) or []
        self._infos[name] = PluginInfo(name, version, tuple(sorted(caller.name for caller in found)))

    def load(self, point: EntryPoint) -> PluginError | None:
        """Import and register what an entry point names. Answers, and lists, the error of an import that fails."""
        name, release = _distribution(point)
        try:
            plugin = point.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._infos[name] = PluginInfo(name, release, error=reason)
            failure = PluginError(f"plugin {name} {release} cannot be imported from {point.value}: {reason}")
            failure.__cause__ = error
            return failure
        self.register(plugin, name, version=release)
        return None

    @overload
    def collect(self, hook: Literal["constraints"]) -> dict[str, ConstraintFactory]: ...
    @overload
    def collect(self, hook: Literal["context_stages"]) -> dict[str, ContextStageFactory]: ...
    @overload
    def collect(self, hook: Literal["kv_formats"]) -> dict[str, KVFormatFactory]: ...
    @overload
    def collect(self, hook: Literal["drafters"]) -> dict[str, DrafterFactory]: ...
    @overload
    def collect(self, hook: Literal["logits_processors"]) -> dict[str, LogitsProcessorFactory]: ...
    def collect(self, hook: str) -> dict[str, Any]:
        """Name -> factory over all plugins.

        Raises DuplicateName where two plugins offer one name, PluginError where a hook raises or answers anything else.
        """
        return {name: factory for name, (factory, _) in self._offers(hook).items()}

    def provenance(self, hook: str, name: str) -> str:
        """The distribution and version that offers `name`: `provenance("drafters", "echo")`."""
        offers = self._offers(hook)
        if name not in offers:
            raise UnknownName(_KINDS[hook], name, offers)
        return str(offers[name][1])

    def info(self) -> list[PluginInfo]:
        """All plugins that were found, the built-ins first, and those that could not be imported."""
        return list(self._infos.values())

    def call(self, hook: str, *, only: str | None = None, **arguments: object) -> None:
        """Call every implementation, or those of one plugin, in the order of registration.

        Raises PluginError naming the one that raises.
        """
        for implementation in self._implementations(hook):
            if only in (None, implementation.plugin_name):
                self._ask(hook, implementation, arguments)

    def notify(self, hook: str, **arguments: object) -> None:
        """Tell the observers. What they raise is counted in `failures` and logged once per plugin."""
        for implementation in self._implementations(hook):
            try:
                _invoke(implementation, arguments)
            except BaseException as error:  # SystemExit too: it would end the engine's thread
                name = implementation.plugin_name
                self.failures[name] += 1
                if self.failures[name] == 1:
                    log.warning("observer raised", plugin=str(self._infos[name]), hook=hook, exc_info=error)

    def _check(self, plugin: object) -> None:
        self._manager.check_pending()
        for caller in self._manager.get_hookcallers(plugin) or []:
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin and (implementation.wrapper or implementation.hookwrapper):
                    raise pluggy.PluginValidationError(plugin, f"hook {caller.name!r} cannot be a wrapper")

    def _implementations(self, hook: str) -> list[pluggy.HookImpl]:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller.get_hookimpls()

    def _ask(self, hook: str, implementation: pluggy.HookImpl, arguments: Mapping[str, object]) -> object:
        try:
            return _invoke(implementation, arguments)
        except Exception as error:
            plugin = self._infos[implementation.plugin_name]
            raise PluginError(f"plugin {plugin}: hook {hook!r} raised {type(error).__name__}: {error}") from error

    def _offers(self, hook: str) -> dict[str, tuple[Any, PluginInfo]]:
        if hook not in _KINDS:
            raise UnknownName("hook", hook, _KINDS)
        offers: dict[str, tuple[object, PluginInfo]] = {}
        for implementation in self._implementations(hook):
            plugin = self._infos[implementation.plugin_name]
            answer = _checked(self._ask(hook, implementation, {}), hook, plugin)
            for name, factory in answer.items():
                if name in offers:
                    raise DuplicateName(f"{_KINDS[hook]} {name!r}: {offers[name][1]} and {plugin}")
                offers[name] = (factory, plugin)
        return offers


def load_plugins(*, only: Collection[str] | None = None, required: Collection[str] = ()) -> Plugins:
    """The built-ins and every installed plugin that `only` and the environment's SPECGEN_PLUGINS both allow.

    Plugins go by their distribution's name. One that cannot be imported is logged and skipped.
    Raises PluginError if it is `required`, if a required one is not installed or not allowed, and for a plugin that
    breaks the contract of a hook.
    """
    plugins = Plugins()
    plugins.register(builtin, _DISTRIBUTION, version=__version__)
    points = sorted((_normal(_distribution(point)[0]), point) for point in entry_points(group=PROJECT))
    installed = {name for name, _ in points}
    allowed = _allowed(installed, only)
    wanted = {_normal(name) for name in required}
    if missing := sorted(wanted - allowed):
        reason = "not allowed" if missing[0] in installed else "not installed"
        choices = ", ".join(sorted(allowed)) or "none"
        raise PluginError(f"required plugin {missing[0]} is {reason}; plugins that may load: {choices}")
    for name, point in points:
        failure = plugins.load(point) if name in allowed else None
        if failure is not None and name in wanted:
            raise failure
        if failure is not None:
            log.warning("plugin skipped", plugin=name, reason=str(failure))
    return plugins


def _allowed(installed: set[str], only: Collection[str] | None) -> set[str]:
    allowed = installed
    variable = os.environ.get(ALLOW_LIST)
    listed = None if variable is None else [name.strip() for name in variable.split(",") if name.strip()]
    for source, names in ((ALLOW_LIST, listed), ("only", only)):
        if names is None:
            continue
        wanted = {_normal(name) for name in names}
        if unknown := sorted(wanted - installed):
            log.warning("plugin not installed", listed_in=source, plugins=unknown, installed=sorted(installed))
        allowed = allowed & wanted
    return allowed


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else (point.name, "")


def _normal(name: str) -> str:
    """One spelling for a distribution's name, as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _invoke(implementation: pluggy.HookImpl, arguments: Mapping[str, object]) -> object:
    """An implementation may leave out arguments that it does not need."""
    return implementation.function(*(arguments[name] for name in implementation.argnames))


def _checked(answer: object, hook: str, plugin: PluginInfo) -> Mapping[str, Callable[..., object]]:
    if not isinstance(answer, Mapping):
        raise PluginError(
            f"plugin {plugin}: hook {hook!r} returned {type(answer).__name__}; it must return name -> factory"
        )
    for name, factory in answer.items():
        if not isinstance(name, str) or not name or not callable(factory):
            raise PluginError(
                f"plugin {plugin}: hook {hook!r} offers {name!r}: {factory!r}; it must be a name and a factory"
            )
    return answer
