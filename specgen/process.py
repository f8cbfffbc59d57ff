"""What belongs to one process, and is to be left alone by children that were forked from it."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from tempfile import mkdtemp


def finalize_here(owner: object, function: Callable[..., object], *args: object, **kwargs: object) -> None:
    """`weakref.finalize` in this process alone: the copy of `owner` that a forked child has ends too, at its exit."""
    weakref.finalize(owner, _only_in, os.getpid(), function, *args, **kwargs)


class ScratchFolder:
    """A temporary folder that goes with this object; like `tempfile.TemporaryDirectory`, but no child removes it."""

    def __init__(self, prefix: str) -> None:
        self.name = mkdtemp(prefix=prefix)
        finalize_here(self, shutil.rmtree, self.name, ignore_errors=True)


def _only_in(process: int, function: Callable[..., object], *args: object, **kwargs: object) -> None:
    if os.getpid() == process:
        function(*args, **kwargs)
