"""The kernels in the shapes that models call them in, for a look at what they compile to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from specgen.kernels.draws import Draw, Warp
from specgen.kernels.kv_layout import LayerPlanes
from specgen.kernels.triton.kv_commit import kv_commit
from specgen.kernels.triton.kv_write import kv_write
from specgen.kernels.triton.sample_rows import sample_rows
from specgen.kernels.triton.segmented_lora import segmented_lora
from specgen.kernels.triton.top_tokens import top_tokens
from specgen.kernels.triton.tree_attention import Tile, WorkItems, tile, tree_attention
from specgen.kv.formats import FORMATS, LayerShape
from specgen.kv.pool import PAGE_SIZE, KVPool

_WARPGROUPS = ("sm_90", "sm_100")


@dataclass(frozen=True, slots=True)
class Variant:
    """A call of a launcher, made for a target of `launches.TARGETS`. hot: runs in every layer of every step of an
    ordinary model, so it may spill nothing."""

    name: str
    call: Callable[[str], object]
    hot: bool = False


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _kept(shape: LayerShape, dtype: torch.dtype, kind: str) -> LayerPlanes:
    pool = KVPool([shape], 1, dtype=dtype, device=torch.device("meta"), kind=FORMATS[kind]())
    return pool.layers[0].kernel_planes


def _writing(target: str, shape: LayerShape, kind: str) -> None:
    new = (_empty(1, shape.kv_heads, dim, dtype=torch.bfloat16) for dim in (shape.key_dim, shape.value_dim))
    kv_write(*new, _kept(shape, torch.bfloat16, kind), _empty(1, dtype=torch.int32))


def _committing(target: str) -> None:
    stacks = [_empty(32, 16, 8, 128, dtype=torch.bfloat16)]
    kv_commit(stacks, _empty(1, 2, dtype=torch.int32), _empty(2, dtype=torch.int32))


def _topping(target: str, count: int) -> None:
    top_tokens(_empty(1, 128_256, dtype=torch.bfloat16), count)


def _drawing(target: str) -> None:
    sample_rows(_empty(1, 128_256, dtype=torch.bfloat16), [Draw(0, 1, Warp(0.8, 40, 0.95, 0.05))])


def _adding(target: str, rank: int) -> None:
    y, x = (_empty(1, 4096, dtype=torch.bfloat16) for _ in "yx")
    sides = ([_empty(rank, 4096, dtype=torch.bfloat16)] for _ in "du")
    segmented_lora(y, x, (0, 1), *sides)


def _attention(
    target: str,
    heads: int,
    shape: LayerShape,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "native",
    *,
    wide: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    kept = _kept(shape, dtype, kind)
    head_bytes = max(shape.key_dim, shape.value_dim) * dtype.itemsize
    chosen: Tile = tile(head_bytes, wide=wide, warpgroups=target in _WARPGROUPS)
    numbers = partial(_empty, dtype=torch.int32)
    work = WorkItems(numbers(1, 11), numbers(1, 7), numbers(1), partials=0 if wide else 1, page_size=PAGE_SIZE)
    query = _empty(1, heads, shape.key_dim, dtype=dtype)
    given = _empty(heads, dtype=dtype) if sinks else None
    tree_attention(query, kept, work, scale=0.1, softcap=softcap, sinks=given, tile=chosen)


def variants() -> Iterator[Variant]:
    """All of them, the hot ones first."""
    llama, small, wide_heads = LayerShape(8, 128, 128), LayerShape(3, 64, 64), LayerShape(4, 256, 256)
    for name, heads, shape in (("32/8 x 128", 32, llama), ("9/3 x 64", 9, small), ("16/4 x 256", 16, wide_heads)):
        for wide in (False, True):
            rows = "prompt" if wide else "rows"
            yield Variant(
                f"tree_attention {rows} {name} native",
                partial(_attention, heads=heads, shape=shape, wide=wide),
                hot=not wide or shape is not wide_heads,
            )
    for kind in FORMATS:
        for wide in (False, True):
            if kind != "native":
                yield Variant(
                    f"tree_attention {'prompt' if wide else 'rows'} 32/8 x 128 {kind}",
                    partial(_attention, heads=32, shape=llama, kind=kind, wide=wide),
                    hot=kind == "int8" and not wide,
                )
    yield Variant(
        "tree_attention rows 8/4 x 256 soft cap",
        partial(_attention, heads=8, shape=wide_heads, softcap=50.0),
    )
    yield Variant(
        "tree_attention rows 64/8 x 64 sinks",
        partial(_attention, heads=64, shape=LayerShape(8, 64, 64), sinks=True),
    )
    yield Variant("tree_attention rows 16/16 x 192+128", partial(_attention, heads=16, shape=LayerShape(16, 192, 128)))
    yield Variant("tree_attention rows 32/8 x 80", partial(_attention, heads=32, shape=LayerShape(8, 80, 80)))
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield Variant(f"tree_attention rows 32/8 x 128 {name}", partial(_attention, heads=32, shape=llama, dtype=dtype))
    for kind in FORMATS:
        yield Variant(f"kv_write 8 x 128 {kind}", partial(_writing, shape=llama, kind=kind), hot=kind == "native")
    yield Variant("kv_commit 8 x 128 native", _committing)
    for count in (1, 8):
        yield Variant(f"top_tokens {count} of 128256", partial(_topping, count=count), hot=count == 1)
    yield Variant("draw of 128256", _drawing)
    for rank in (16, 64):
        yield Variant(f"segmented_lora 4096 x {rank} x 4096", partial(_adding, rank=rank))
