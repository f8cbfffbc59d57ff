"""How keys and values lie in a pool, as kernels must know it. `specgen.kv.formats` defines the formats."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Coding(IntEnum):
    """What stands for a vector x of a head, that kernels can read: codes c and, beside them, their sizes.

    PLAIN    x = c
    SCALED   x = c * scale       c: int8 or float8_e4m3fn; sizes: float16 [scale]
    AFFINE4  x = c * step + low  c: 0 to 15, two a byte, the even number in the low bits; sizes: float16 [low, step]
    """

    PLAIN = 0
    SCALED = 1
    AFFINE4 = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """One layer's keys and values. rotated: heads are rotated by a Hadamard matrix."""

    kv_heads: int
    key_dim: int
    value_dim: int
    key: Coding = Coding.PLAIN
    value: Coding = Coding.PLAIN
    rotated: bool = False


@dataclass(frozen=True, slots=True)
class LayerPlanes:
    """One layer's planes, [slots, kv_heads, ...] each.

    key, value: codes. key_sizes, value_sizes: `None` for plain numbers. centre: float32[kv_heads, key_dim], what was
    taken off each key.
    """

    layout: Layout
    key: Tensor
    value: Tensor
    key_sizes: Tensor | None = None
    value_sizes: Tensor | None = None
    centre: Tensor | None = None
