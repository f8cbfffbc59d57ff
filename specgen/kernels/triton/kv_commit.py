"""Accepted rows of a tree moved to where they belong, in all layers; what `KVPool.move` does, in one launch a stack.

A sequence's rows move down, never onto one that still has to move: each program moves its bytes of all of them, one
after another, in order, which no other program touches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 1024


@triton.jit
def _move(
    stack: tl.tensor,
    moves: tl.tensor,
    starts: tl.tensor,
    slots: int,
    words: int,
    WORDS: tl.constexpr,
) -> None:
    layer, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    there = word < words
    for number in range(tl.load(starts + sequence), tl.load(starts + sequence + 1)):
        source = layer * slots + tl.load(moves + 2 * number)
        target = layer * slots + tl.load(moves + 2 * number + 1)
        tl.store(stack + target * words + word, tl.load(stack + source * words + word, mask=there), mask=there)


def kv_commit(stacks: list[Tensor], moves: Tensor, starts: Tensor) -> None:
    """Copy slots onto slots in every stack [layers, slots, ...].

    moves: int32[n, 2], from and to. starts: int32[sequences + 1]: sequence i has the moves from starts[i] to
    starts[i + 1], its own slots alone, ascending, each to a lower slot of its table's order.
    """
    for stack in stacks:
        rows = _words(stack)
        layers, slots, words = rows.shape
        grid = (layers, len(starts) - 1, triton.cdiv(words, _WORDS))
        _move[grid](rows, moves, starts, slots, words, WORDS=_WORDS)


def _words(stack: Tensor) -> Tensor:
    """The stack as [layers, slots, words] of the widest whole numbers that a slot consists of."""
    size = stack[0, 0].numel() * stack.element_size()
    kind = next(k for k in (torch.int64, torch.int32, torch.int16, torch.uint8) if size % k.itemsize == 0)
    return stack.flatten(2).view(torch.uint8).view(kind)
