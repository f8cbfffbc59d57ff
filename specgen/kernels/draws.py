"""What is drawn at a row of logits: under which random key, and how the row is warped before."""

from __future__ import annotations

from typing import NamedTuple


class Warp(NamedTuple):
    """Settings that vectorise, in the order in which they apply; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Draw(NamedTuple):
    """One draw: of which row of logits, under which random key of a position, and how warped."""

    row: int
    key: int
    warp: Warp
