"""Whether the engine is well: its thread lives, steps are taken where there is work, and they succeed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from specgen.api.engine import Engine
from specgen.server.config import ServerConfig


class Health:
    """Looks at an engine from outside. `watch` has to run for stalls to be seen."""

    def __init__(self, engine: Engine, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._config = config
        self._clock = clock
        self._steps = -1
        self._moved = clock()

    @property
    def trouble(self) -> str | None:
        """What is wrong, in words that give nothing away; None while all is well."""
        if self._engine.failure is not None:
            return "the engine's thread has ended"
        if self._engine.failed_steps >= self._config.failed_steps:
            return f"the last {self._engine.failed_steps} steps of the engine failed"
        if self._clock() - self._moved > self._config.stall_seconds:
            return f"the engine has taken no step for {self._config.stall_seconds:g} seconds, though there is work"
        return None

    def look(self) -> None:
        """Take note of what the engine did since the last look."""
        load, steps = self._engine.load, self._engine.counters.steps
        if steps != self._steps or not load.running + load.waiting:
            self._steps, self._moved = steps, self._clock()

    async def watch(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            await asyncio.sleep(min(1.0, self._config.stall_seconds / 4))
