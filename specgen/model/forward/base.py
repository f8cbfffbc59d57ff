"""The contract of a packed forward: eager, captured as graphs, or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specgen.kv.pool import KVPool
from specgen.model.output import ForwardOutput
from specgen.model.segment import Segment


class Forward(Protocol):
    """One way to run a model over packed rows. Not thread-safe."""

    @property
    def pool(self) -> KVPool:
        """Where keys and values are, for good."""

    def __call__(self, segments: Sequence[Segment]) -> ForwardOutput:
        """Score all rows and write their KV behind each segment's prefix, whose table must own the slots
        (`BlockTable.reserve`). Nothing is committed: the same rows may be given again."""
