"""What a forward costs, measured by forwards that serve no text."""

from __future__ import annotations

import time

import torch

from specgen.model.checks.invariance import opened_tables
from specgen.model.forward.base import Forward
from specgen.model.segment import Segment


@torch.inference_mode()
def row_seconds(forward: Forward, rows: int, context: int = 0) -> float:
    """Seconds of one forward over `rows` rows of one text behind `context` tokens, whatever their keys and values,
    measured now: the faster of two, after a first one."""
    pool = forward.pool
    with opened_tables(pool, context + rows) as (table,):
        table.commit(context)
        for page in table.pages if context else ():  # memory that nobody wrote to is nowhere, and read in no time
            for plane in pool.rows_of(page):
                plane.zero_()
        segment = Segment(table, [0] * rows, range(context, context + rows), None, range(rows))
        forward([segment])
        return min(_timed(forward, segment) for _ in range(2))


def _timed(forward: Forward, segment: Segment) -> float:
    started = time.perf_counter()
    forward([segment])
    return time.perf_counter() - started
