"""Every hook a plugin can implement. Mark an implementation with `hookimpl`; plugins/README.md shows each one in use.

The first five offer something: they are called when an engine is built, on the thread that builds it, and maybe again
when plugins are listed, so they answer at once and always alike. Two add to the command line and to a server. The last
three observe: they are called on the engine's thread, between two steps, so what is slow in them slows every request.
An observer that raises is caught, counted and logged once per plugin; the requests go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

from specgen.context.stage import ContextStageFactory
from specgen.draft.drafter import DrafterFactory
from specgen.engine.request import Request
from specgen.kv.formats import KVFormatFactory
from specgen.sampling.constraint import ConstraintFactory
from specgen.types import LogitsProcessorFactory, Result, StepOutput

if TYPE_CHECKING:
    import typer
    from aiohttp import web

    from specgen.api.engine import Engine

PROJECT = "specgen"
"""pluggy's project name and the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def context_stages() -> Mapping[str, ContextStageFactory]:
    """Offer stages between a request and its token ids, by the name a config uses for them.

    Called when an engine is built. The order of stages is the config's, never the hooks'.
    """
    return {}


@hookspec
def kv_formats() -> Mapping[str, KVFormatFactory]:
    """Offer ways to keep keys and values, by the name that `kv_format` in a config uses.

    Called when an engine is built.
    """
    return {}


@hookspec
def drafters() -> Mapping[str, DrafterFactory]:
    """Offer drafters by the name a config or a request uses for them.

    Called when an engine is built; a factory is called once per engine, and only if its drafter is wanted.
    """
    return {}


@hookspec
def logits_processors() -> Mapping[str, LogitsProcessorFactory]:
    """Offer logits processors by the name a request uses for them.

    Called when an engine is built; a factory is called for each sequence that asks for its processor. Processors see
    exactly the calls that decoding without drafts would make.
    """
    return {}


@hookspec
def constraints() -> Mapping[str, ConstraintFactory]:
    """Offer kinds of constraints by the name a request uses for them: grammars that its text must keep to.

    Called when an engine is built; a factory is called for each request that asks for its kind, on a thread of its
    own, while the one that submits it waits.
    """
    return {}


@hookspec
def register_commands(cli: typer.Typer) -> None:
    """Add commands to the command line: `@cli.command()`.

    Called on the main thread when `specgen` is given a word that is none of its own commands, so that its own start
    waits for no plugin. Import what is heavy inside the command.
    """


@hookspec
def register_routes(app: web.Application, engine: Engine) -> None:
    """Add routes to a server: `app.router.add_get("/hello", handler)` is served at `/plugins/<distribution>/hello`.

    Called on the event loop's thread when a server is built, and only for plugins that its `plugin_routes` name. They
    need a key like all routes; what a handler raises is answered as an error that names the plugin.
    """


@hookspec
def on_request(request: Request) -> None:
    """See a request that the engine accepted, before its first step. Called on the engine's thread, in the context of
    who submitted it (`contextvars`), so that traces go on; only read it."""


@hookspec
def on_step(outputs: Sequence[StepOutput]) -> None:
    """See what one step added, one output per sequence that gained tokens or was cancelled. Called on the engine's
    thread after each step. Where identical requests share a run, its outputs come once, under the id of the first;
    what the response cache answers comes in no step."""


@hookspec
def on_finish(result: Result) -> None:
    """See a finished sequence with its usage and acceptance statistics. Called on the engine's thread, once for each
    sequence of each request, however it was answered."""
