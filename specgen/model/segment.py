"""What a packed forward is made of: for each sequence, the rows hung under its committed prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specgen.kv.pool import BlockTable
from specgen.lora.adapter import LoraWeights


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in one packed forward.

    Row i holds `tokens[i]`, and sees the whole committed prefix of `table`, its ancestors in the tail behind the
    prefix, and itself. The tail is the rows of earlier forwards that were not committed, then the rows of this one;
    `positions` gives the absolute position of every tail row, so `len(positions) - len(tokens)` rows came earlier.

    parents: for each tail row the earlier one that it hangs under, -1 for the prefix; `None` is a chain, in which each
        hangs under the row before it.
    logits: rows whose logits are wanted.
    adapter: what the rows run under; `None` is the model as it is.
    """

    table: BlockTable
    tokens: Sequence[int]
    positions: Sequence[int]
    parents: Sequence[int] | None = None
    logits: Sequence[int] = ()
    adapter: LoraWeights | None = None

    @property
    def tail(self) -> int:
        """Rows behind the committed prefix once this forward has run."""
        return len(self.positions)

    @property
    def new_positions(self) -> Sequence[int]:
        """Absolute positions of this forward's rows."""
        return self.positions[self.tail - len(self.tokens) :]

    @property
    def first_position(self) -> int:
        """Absolute position of this forward's first row."""
        return self.positions[self.tail - len(self.tokens)]

    @property
    def end(self) -> int:
        """Slots of the sequence in use once this forward has run."""
        return self.table.length + self.tail


def tree_segment(
    table: BlockTable,
    chain: Sequence[int],
    tokens: Sequence[int],
    parents: Sequence[int],
    adapter: LoraWeights | None = None,
) -> Segment:
    """`chain` below the committed prefix, and below its last token the tree `tokens`, `parents` (-1 = that token).

    Logits are asked for at the last chain token and at every tree node.
    """
    base = len(chain)
    positions = list(range(table.length, table.length + base))
    for parent in parents:
        positions.append(positions[base + parent] + 1)
    is_chain = all(parent == node - 1 for node, parent in enumerate(parents))
    hung = None if is_chain else [*range(-1, base - 1), *(base + parent for parent in parents)]
    rows = range(base - 1, base + len(tokens))
    return Segment(table, [*chain, *tokens], positions, hung, rows, adapter)


def ancestors(parents: Sequence[int]) -> list[list[int]]:
    """For each tail row its ancestors and itself, in ascending order."""
    found: list[list[int]] = []
    for row, parent in enumerate(parents):
        found.append([*found[parent], row] if parent >= 0 else [row])
    return found
