"""Forwards that serve no text: what one costs, and which of its rows each layer sees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from specgen.kv.pool import PAGE_SIZE, KVPool
from specgen.model.checks.invariance import opened_tables
from specgen.model.lora_layers import routed_layers, rows_counted
from specgen.model.segment import Segment

if TYPE_CHECKING:
    from specgen.model.runner import ModelRunner

# Numbers that a layer's input tells apart.
_PREFIX, _ROWS, _WANTED = 6, 5, 2


def row_seconds(target: ModelRunner, rows: int, context: int = 0) -> float:
    """Seconds of one forward over `rows` rows of one text behind `context` tokens, whatever their keys and values,
    measured now: the faster of two, after a first one."""
    with _uncounted(target), opened_tables(target, context + rows) as (table,):
        table.length = context
        for page in table.pages if context else ():  # memory that nobody wrote to is nowhere, and read in no time
            for plane in target.pool.rows_of(page):
                plane.zero_()
        segment = Segment(table, [0] * rows, range(context, context + rows), None, range(rows))
        target.forward([segment])
        return min(_timed(target, segment) for _ in range(2))


def rows_seen(target: ModelRunner) -> dict[str, bool]:
    """Whether a linear layer sees only the rows whose logits are wanted, of all that see one row for each of a step's
    or for each of those, by the layer's name. A target that runs nothing else meanwhile."""
    with (
        rows_counted(target.model) as seen,
        _uncounted(target),
        _scratch_pool(target),
        opened_tables(target, _PREFIX + _ROWS) as (table,),
    ):
        table.commit(_PREFIX)
        positions = range(_PREFIX, _PREFIX + _ROWS)
        target.forward([Segment(table, [0] * _ROWS, positions, None, range(_WANTED))])
    routed = routed_layers(target.model)
    wanted = {name: rows == {_WANTED} for name, rows in seen.items() if name not in routed}
    return {name: last for name, last in wanted.items() if last or seen[name] == {_ROWS}}


def _timed(target: ModelRunner, segment: Segment) -> float:
    started = time.perf_counter()
    target.forward([segment])
    return time.perf_counter() - started


@contextmanager
def _uncounted(target: ModelRunner) -> Iterator[None]:
    """Forwards in here are not among those that `target` counts."""
    before = target.forwards, target.rows
    try:
        yield
    finally:
        target.forwards, target.rows = before


@contextmanager
def _scratch_pool(target: ModelRunner) -> Iterator[None]:
    """Let `target` write to a small pool of its own."""
    pool, architecture = target.pool, target.architecture
    pages = -(-(_PREFIX + _ROWS) // PAGE_SIZE)
    target.pool = KVPool(architecture.shapes, pages, dtype=architecture.dtype, device=target.device)
    try:
        yield
    finally:
        target.pool = pool
