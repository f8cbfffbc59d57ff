"""A server for each test, and one engine for all that leave it as it was."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from specgen import Engine
from tests.support.servers import World, engine, serving


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[Engine]:
    """Leave it as you found it."""
    with engine() as found:
        yield found


@pytest.fixture
async def world(shared_engine: Engine, one_thread: None) -> AsyncIterator[World]:
    """A server with default settings."""
    async with serving(shared_engine) as found:
        yield found
