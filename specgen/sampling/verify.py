"""The walk: verification of a tree by drawing first and comparing after.

The token is drawn from the target's own distribution at the root; if a child holds it, the walk steps there and draws
again, else it ends. What is committed is therefore what the target draws, whatever the tree holds, and a node is left
only through a token that no child has: acceptance at a node is the sum of p over its children, the most that any
lossless rule can reach for that set of children. Rows are visited in the order of plain decoding, so every processor
sees exactly the calls that plain decoding would make.
"""

from __future__ import annotations

from collections.abc import Callable

from specgen.tree import children
from specgen.types import Acceptance, Finish, Logprob, TokenTree

DrawToken = Callable[[int], tuple[int, Finish | None]]
"""Node (-1 = root) -> the token drawn at its row, and why the sequence ends with it, if it does."""


def walk(tree: TokenTree, draw: DrawToken) -> tuple[tuple[int, ...], tuple[int, ...], Finish | None]:
    """Committed tokens, accepted nodes, and the end if a stop rule said so.

    `draw` is called once per committed token, in order. Walks of deterministic trees are lossless for any tree.
    """
    below = children(tree)
    committed: list[int] = []
    nodes: list[int] = []
    node = -1
    while True:
        token, finish = draw(node)
        committed.append(token)
        child = None if finish else below[node + 1].get(token)
        if child is None:
            return tuple(committed), tuple(nodes), finish
        nodes.append(child)
        node = child


def acceptance(tree: TokenTree, draw: DrawToken, logprob: Callable[[int, int], Logprob] | None = None) -> Acceptance:
    """The walk with the log-probabilities of what it committed: `logprob(node, token)`."""
    committed, nodes, finish = walk(tree, draw)
    rows = (-1, *nodes)
    logprobs = tuple(logprob(row, token) for row, token in zip(rows, committed, strict=True)) if logprob else ()
    return Acceptance(committed, nodes, logprobs, finish)
