"""What belongs to one process, and is to be left alone by children that were forked from it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from tempfile import TemporaryDirectory

_folders: weakref.WeakSet[TemporaryDirectory[str]] = weakref.WeakSet()


def at_fork(**hooks: Callable[[], object]) -> None:
    """`os.register_at_fork`, on systems where a process can fork: on Windows there is nothing to do."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**hooks)


def finalize_here(owner: object, function: Callable[..., object], *args: object, **kwargs: object) -> None:
    """`weakref.finalize` in this process alone: the copy of `owner` that a forked child has ends too, at its exit."""
    weakref.finalize(owner, _only_in, os.getpid(), function, *args, **kwargs)


def leave_to_parent(folder: TemporaryDirectory[str]) -> TemporaryDirectory[str]:
    """The folder, which no forked child removes when it ends."""
    _folders.add(folder)
    return folder


def _let_go() -> None:
    for folder in _folders:
        folder._finalizer.detach()  # type: ignore[attr-defined]


at_fork(after_in_child=_let_go)


def _only_in(process: int, function: Callable[..., object], *args: object, **kwargs: object) -> None:
    if os.getpid() == process:
        function(*args, **kwargs)
