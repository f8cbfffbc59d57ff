"""Engines that prove after every step that nothing leaks, and ways to move what their prefix cache holds."""

from __future__ import annotations

from typing import Any

from specgen import Engine
from specgen.api import kept_engine


def watched(engine: Engine) -> Engine:
    """The same engine, checked after every step. Pages come back from the tiers whatever the clock says.

    Tiny models compute a page in no time: what is restored must not depend on it.
    """
    core, step = engine._core, engine._core.step

    def checked() -> Any:
        outputs = step()
        core.check()
        return outputs

    core.step = checked  # type: ignore[method-assign]
    if core.prefix and core.prefix.tiers:
        core.prefix.tiers._token_seconds = lambda: 1e6
    return engine


def evict(engine: Engine) -> None:
    """Push all that is cached out of the pool, into the tiers where there are some."""
    core = engine._core
    assert core.prefix
    engine._runner.call(lambda: core.prefix.evict(core.target.pool.pages))  # type: ignore[union-attr]
    assert engine.prefix.stats.pages == 0


def close_kept() -> None:
    """Close the engine that the one-line helpers keep."""
    while kept_engine._latest:
        kept_engine._latest.pop().close()
