"""Servers for the tests of this folder."""

from tests.support.server_fixtures import shared_engine, world

__all__ = ["shared_engine", "world"]
