"""Matrix products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(left: tl.tensor, right: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """float32: `sums` plus left times right. Factors in float32 are taken as they are, not rounded for tensor cores."""
    if INTERPRETED:
        # Triton's interpreter holds bfloat16 as whole numbers, and would multiply those.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
