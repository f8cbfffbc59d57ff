"""Every error that specgen raises on purpose. Each message names the value and the choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecgenError(Exception):
    """Base of all errors raised by specgen."""


class InvalidRequest(SpecgenError, ValueError):
    """A request that cannot be served as it stands; the engine goes on with the others.

    `param` names the offending field, as in OpenAI's error object.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    """The engine's context has no room: behind a prompt for a single new token, or for all that `model.generate` was
    asked for."""


class UnknownName(InvalidRequest):
    """A name that nothing offers: a drafter, a context stage, an option."""

    def __init__(
        self, kind: str, name: object, known: Iterable[str], *, param: str | None = None, hint: str | None = None
    ) -> None:
        names = sorted(known)
        message = f"unknown {kind} {name!r}; choices: {', '.join(names) or 'none'}"
        if not hint and (meant := _like(str(name), names)):
            hint = f"did you mean {meant!r}?"
        super().__init__(f"{message}; {hint}" if hint else message, param=param)


def _like(name: str, known: list[str]) -> str | None:
    """The one that was probably meant, whatever its case and its dashes."""
    plain = {other.lower().replace("_", "").replace("-", ""): other for other in known}
    near = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), plain, n=1, cutoff=0.75)
    return plain[near[0]] if near else None


class AdapterRefused(InvalidRequest):
    """An adapter that cannot be loaded; nothing has changed. The message names what does not fit."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="adapter")


class UnsupportedModel(SpecgenError):
    """The model cannot be verified exactly; the message names the layer and what can be done instead."""


class ModelChanged(SpecgenError):
    """The model of an engine is not what it was, and requests still run under what it was; the message names what
    changed. `Engine.refresh` ends them and takes the model as it is."""


class DrafterMismatch(SpecgenError):
    """A drafter that does not fit the target, for instance one with another vocabulary."""


class PluginError(SpecgenError):
    """A plugin that cannot be loaded or breaks the contract of a hook."""


class DuplicateName(PluginError):
    """Two plugins offer one name; the message names both distributions."""


class RequestFailed(SpecgenError):
    """A request that was accepted and could not be finished, for instance because memory ran out or a plugin raised.

    What the caller's own processors and criteria raise is raised as it is, and not as this.

    `part` names what failed, where that is known: "context stage 'shout'".
    """

    def __init__(self, message: str, *, part: str | None = None) -> None:
        super().__init__(message)
        self.part = part


class RequestCancelled(RequestFailed):
    """The request was cancelled before it finished."""


class Overloaded(SpecgenError):
    """There is no room for this request now; the same one may be served later."""


class EngineClosed(SpecgenError):
    """The engine was closed, or belongs to the process that this one was forked from; open a new one."""


class WouldDeadlock(SpecgenError, RuntimeError):
    """Code that runs on an engine's thread, such as a processor, a criterion or an observer, wants to wait for that
    engine, which waits for the code. What it asks for is better asked by another thread, later or of another engine."""


class OutOfPages(SpecgenError):
    """The KV pool has no free page left. The scheduler answers it by preemption; users never see it."""


def check_text(text: str, what: str, *, param: str) -> None:
    """Raise InvalidRequest for a string that is no Unicode text: half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.start + 1]
        raise InvalidRequest(f"{what} {half!r}, which is half a surrogate pair and no text", param=param) from None
