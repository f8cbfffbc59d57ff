"""The proof, at load, that a row's bits do not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kv.pool import PAGE_SIZE, BlockTable, KVPool
from specgen.model.forward.base import Forward
from specgen.model.segment import Segment, tree_segment

_LENGTH = 24
_BESIDE = 100
_STEP = 37
CHECK_PAGES = 2 * -(-2 * _LENGTH // PAGE_SIZE) + -(-_BESIDE // PAGE_SIZE)
"""Pages that the check needs at once."""


@torch.inference_mode()
def check_invariance(forward: Forward, model: PreTrainedModel, vocab_size: int, instead: str) -> None:
    """Compare the logits of one text, to the bit: read at once, in parts, row by row, in a tree, beside other rows.

    model: the one that `forward` runs. instead: what a user can do about a refusal. Raises UnsupportedModel naming the
    first layer that differs.
    """
    check = _Check(forward, model, vocab_size)
    ids = check.ids(_LENGTH)
    expected = check.read(ids, [_LENGTH])
    for parts in ([16, *[1] * (_LENGTH - 16)], [5, 1, 7, _LENGTH - 13]):
        if not torch.equal(check.read(ids, parts), expected):
            raise refusal(model, check.culprit(ids), instead)
    if not torch.equal(check.read(ids, [_LENGTH], beside=True), expected):
        raise refusal(model, check.culprit(ids), instead)
    if not torch.equal(check.in_tree(ids), expected[-5:]):
        raise refusal(model, "a row in a tree differs from the same row in a chain", instead)


def refusal(model: PreTrainedModel, reason: str, instead: str) -> UnsupportedModel:
    """The error for a model whose rows cannot be batch-invariant."""
    kind = model.config.model_type
    return UnsupportedModel(f"model type {kind!r}: batch_invariant=True cannot be kept: {reason}; {instead}")


@dataclass(frozen=True, slots=True)
class _Check:
    """A forward, the model that it runs, and the length of a row of logits."""

    forward: Forward
    model: PreTrainedModel
    vocab_size: int

    def ids(self, count: int, first: int = 1) -> list[int]:
        """Ordinary tokens from all over the vocabulary."""
        size = self.vocab_size
        return [size // 10 + (first + i * _STEP) % (size * 8 // 10) for i in range(count)]

    def read(self, ids: Sequence[int], parts: Sequence[int], *, beside: bool = False) -> Tensor:
        """The logits of all rows of `ids`, read in `parts`; with `beside` between the rows of two other texts."""
        logits = []
        with opened_tables(self.forward.pool, len(ids), 7, _BESIDE) as (table, before, behind):
            for part in parts:
                segments = [_chunk(table, ids[table.length : table.length + part])]
                if beside:
                    segments.insert(0, _chunk(before, self.ids(7, first=5)))
                    segments.append(_chunk(behind, self.ids(_BESIDE, first=9)))
                start = len(segments[0].tokens) if beside else 0
                logits.append(self.forward(segments).logits[start : start + part])
                table.commit(part)
        return torch.cat(logits)

    def in_tree(self, ids: Sequence[int]) -> Tensor:
        """The logits of the last five rows of `ids`, of which the last three stand in a tree among wrong tokens."""
        wrong = self.ids(4, first=11)
        tree = [wrong[0], ids[-3], wrong[1], wrong[2], ids[-2], wrong[3], ids[-1]]
        parents = [-1, -1, 0, 1, 1, 3, 4]
        with opened_tables(self.forward.pool, 2 * len(ids), 7) as (table, before):
            self.forward([_chunk(table, ids[:-5])])
            table.commit(len(ids) - 5)
            segments = [_chunk(before, self.ids(7, first=5)), tree_segment(table, ids[-5:-3], tree, parents)]
            segments[1] = replace(segments[1], logits=range(len(segments[1].tokens)))
            return self.forward(segments).logits[7:][[0, 1, 3, 6, 8]]

    def culprit(self, ids: Sequence[int]) -> str:
        """The first layer whose output for one row changes when other rows stand beside it."""
        traces = []
        for accompanied in (False, True):
            with opened_tables(self.forward.pool, len(ids), _BESIDE) as (table, other):
                self.forward([_chunk(table, ids[:-1])])
                table.commit(len(ids) - 1)
                segments = [_chunk(table, ids[-1:])]
                if accompanied:
                    segments.append(_chunk(other, self.ids(_BESIDE, first=9)))
                with _first_rows(self.model) as rows:
                    self.forward(segments)
            traces.append(rows)
        alone, beside = traces
        for name, row in alone.items():
            if name in beside and not torch.equal(row, beside[name]):
                kind = type(self.model.get_submodule(name)).__name__
                return f"{name} ({kind}) rounds a row differently beside others"
        return "its rows are rounded differently beside others"


@contextmanager
def opened_tables(pool: KVPool, *tokens: int) -> Iterator[list[BlockTable]]:
    """Tables of `pool` with slots for so many tokens each, released on the way out."""
    tables = [pool.open() for _ in tokens]
    try:
        for table, count in zip(tables, tokens, strict=True):
            table.reserve(count)
        yield tables
    finally:
        for table in tables:
            table.release()


def _chunk(table: BlockTable, ids: Sequence[int]) -> Segment:
    start = table.length
    return Segment(table, ids, range(start, start + len(ids)), None, range(len(ids)))


@contextmanager
def _first_rows(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each module answers for the first row, in the order in which they answer."""
    rows: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.ndim > 1 and name not in rows:
            rows[name] = (first[0, 0] if first.ndim > 2 else first[0]).clone()

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
