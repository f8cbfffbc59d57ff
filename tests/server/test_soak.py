"""Seconds of the soak that `make soak` keeps up for ten minutes, and a minute of it."""

from __future__ import annotations

import pytest

from tests.support.soak import CLIENTS, soak

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seconds", [20.0, pytest.param(60.0, marks=pytest.mark.slow)])
async def test_nothing_is_wrong_and_nothing_stays_behind(seconds: float) -> None:
    found = await soak(seconds)
    assert not found.wrong, "\n".join(found.wrong[:5])
    assert found.answers > CLIENTS
    assert found.aborted > 5
    assert found.memory[-1] - found.memory[0] < 48 << 20, str(found)
    assert found.descriptors[-1] <= found.descriptors[0] + 1, str(found)
