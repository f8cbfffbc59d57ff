"""What tests of attention kernels share: a poisoned pool with sequences on scattered pages, and the reference on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specgen.kernels.reference import tree_attention
from specgen.kv.formats import NATIVE, KVFormat, LayerShape
from specgen.kv.pool import PAGE_SIZE, BlockTable, KVPool
from specgen.model.attention.masks import first_key, segment_mask
from specgen.model.attention.reach import Reach
from specgen.model.segment import Segment, tree_segment

SCALE = 0.3
REACHES = (Reach(), Reach(window=7), Reach(window=1), Reach(chunk=16))


@dataclass
class World:
    """A pool of one layer, poisoned, in which sequences lie on scattered pages."""

    heads: int
    shape: LayerShape
    dtype: torch.dtype
    kind: KVFormat = NATIVE
    pages: int = 64
    page_size: int = PAGE_SIZE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        layers = [self.shape]
        self.pool = KVPool(
            layers, self.pages, dtype=self.dtype, device=self.device, kind=self.kind, page_size=self.page_size
        )
        self.store = self.pool.layers[0]
        for stack in self.pool.stacks:
            # All bits set: NaN in every floating type, and in the codes the largest or -1.
            stack.view(torch.uint8).fill_(255)
        if self.kind.centred:
            self.store.centre(self.noise(1, self.shape.kv_heads, self.shape.key_dim)[0, :, 0].float())

    def noise(self, rows: int, heads: int, dim: int) -> Tensor:
        return torch.randn(1, heads, rows, dim, generator=self.generator).to(self.device, self.dtype)

    def sequence(self, committed: int, room: int = 64) -> BlockTable:
        """A table with `committed` tokens, its pages in no order."""
        table = self.pool.open()
        pages = self.pool.take(-(-(committed + room) // self.pool.page_size))
        random.Random(0).shuffle(pages)
        table.adopt(pages, committed)
        keys, values = (
            self.noise(committed, self.shape.kv_heads, d)[0].transpose(0, 1)
            for d in (self.shape.key_dim, self.shape.value_dim)
        )
        self.store.write(table.slots(0, committed), keys, values)
        return table

    def new_rows(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        return (
            self.noise(rows, self.heads, shape.key_dim),
            self.noise(rows, shape.kv_heads, shape.key_dim),
            self.noise(rows, shape.kv_heads, shape.value_dim),
        )

    def reference(
        self, segments: Sequence[Segment], query: Tensor, reach: Reach, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """float64[rows, heads, value_dim] for query [1, heads, rows, key_dim]; the pool must hold the rows already."""
        store, outputs, row = self.store, [], 0
        for segment in segments:
            start = first_key(segment, reach)
            span, visible = segment.table.span(start, segment.end), segment_mask(segment, start, reach)
            keys, values = (side.double().transpose(0, 1) for side in store.read(span))
            count = len(segment.tokens)
            mine = query[0, :, row : row + count].double().transpose(0, 1)
            mine = (store.rotate_query(mine) if store.rotated else mine).transpose(0, 1)
            options = {"scale": SCALE, "softcap": softcap or None, "sinks": None if sinks is None else sinks.double()}
            found = tree_attention(mine, keys, values, visible, **options).transpose(0, 1)
            outputs.append(store.rotate_output(found) if store.rotated else found)
            row += count
        return torch.cat(outputs)


def chain(table: BlockTable, rows: int) -> Segment:
    return Segment(table, [1] * rows, range(table.length, table.length + rows), None, range(rows))


def tree(table: BlockTable, base: int, nodes: int) -> Segment:
    draw = random.Random(nodes)
    return tree_segment(table, [1] * base, [2] * nodes, [draw.randrange(-1, node) for node in range(nodes)])


def later(table: BlockTable) -> Segment:
    """Rows of which some came in an earlier forward."""
    whole = tree(table, 1, 8)
    assert whole.parents is not None
    return Segment(table, [2] * 4, whole.positions, whole.parents, range(4))
