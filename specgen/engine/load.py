"""What an engine says of itself to whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is: sequences that run and wait, pages of the KV pool in use by them and the prefix cache, and
    how often a sequence had to give its pages back. prefix_: tokens of admitted prompts, and those found cached."""

    running: int
    waiting: int
    used_pages: int
    total_pages: int
    preemptions: int
    prefix_queried: int = 0
    prefix_cached: int = 0


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was built. Counts, not seconds: they are the same on every machine."""

    steps: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    finished: dict[str, int] = field(default_factory=dict)
