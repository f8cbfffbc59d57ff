"""How long a request may take, counted from its arrival: reading it is part of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from specgen.server.protocol.errors import ApiError


@asynccontextmanager
async def in_time(arrival: float, seconds: float) -> AsyncIterator[None]:
    """Time for a request that came at `arrival`, of `time.monotonic`. Raises ApiError 408 once it has passed."""
    try:
        async with asyncio.timeout(arrival + seconds - time.monotonic()):
            yield
    except TimeoutError:
        raise ApiError(408, f"the request took longer than {seconds:g} seconds", code="timeout") from None
