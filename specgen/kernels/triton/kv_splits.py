"""Spans: the pieces into which a context is cut, at the same places for every row of every batch.

Keys are summed up span by span, each from nothing, and the sums are merged from left to right. So it makes no
difference to a single bit whether one program walks along all spans or each span has a program of its own: a prompt is
read the one way, a few rows over a long context the other, and a row cannot tell.

The first 16 spans are 256 keys long, the next 16 twice as long, and so on: enough pieces for a whole GPU behind a few
thousand keys, and no more than some hundred behind a million.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

_FIRST = 256
_ALIKE = 16
FIRST, ALIKE = tl.constexpr(_FIRST), tl.constexpr(_ALIKE)


def starts(end: int) -> np.ndarray:
    """int64[n + 1]: where the spans of the first `end` keys begin, and the end of the last, at or behind `end`."""
    edges = [0]
    while edges[-1] < end:
        edges.append(edges[-1] + (_FIRST << (len(edges) - 1) // _ALIKE))
    return np.array(edges)


@triton.jit
def start_of(span: tl.tensor) -> tl.tensor:
    """Where a span begins: `starts` as the kernels compute it."""
    doubled = span // ALIKE
    times = 1 << doubled
    return ((times - 1) * ALIKE + (span - doubled * ALIKE) * times) * FIRST
