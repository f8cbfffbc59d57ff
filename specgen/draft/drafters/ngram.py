"""Where has the end of this text been seen before? An index over ids that grows as they are committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from specgen.types import TokenTree

_POSITIONS_KEPT = 8
_LONGEST_MATCH = 16


class NgramIndex:
    """Positions of every n-gram of `order` ids in a growing source, the latest few each."""

    def __init__(self, source: Iterable[int], order: int) -> None:
        self.ids: list[int] = []
        self._order = order
        # Most n-grams stand in one place: a number takes a tenth of a list, and texts are long.
        self._ends: dict[tuple[int, ...], int | list[int]] = {}
        self.extend(source)

    def extend(self, ids: Iterable[int]) -> None:
        """Append `ids` to the source."""
        order = self._order
        for token in ids:
            self.ids.append(token)
            if len(self.ids) >= order:
                self._note(tuple(self.ids[-order:]), len(self.ids))

    def _note(self, ngram: tuple[int, ...], end: int) -> None:
        ends = self._ends.get(ngram)
        if ends is None:
            self._ends[ngram] = end
        elif isinstance(ends, int):
            self._ends[ngram] = [ends, end]
        else:
            ends.append(end)
            del ends[:-_POSITIONS_KEPT]

    def matches(self, query: Sequence[int]) -> list[tuple[int, int]]:
        """Where the end of `query` stands in the source with something behind it, as (length of the match, position
        behind it); longest first, then latest. Lengths are counted up to 16."""
        if len(query) < self._order:
            return []
        ends = self._ends.get(tuple(query[-self._order :]), [])
        ends = [ends] if isinstance(ends, int) else ends
        found = [(self._length(query, end), end) for end in ends if end < len(self.ids)]
        return sorted(found, reverse=True)

    def _length(self, query: Sequence[int], end: int) -> int:
        length = self._order
        most = min(end, len(query), _LONGEST_MATCH)
        while length < most and self.ids[end - length - 1] == query[-length - 1]:
            length += 1
        return length


def continuations(index: NgramIndex, starts: Iterable[tuple[int, int]], max_nodes: int, branches: int) -> TokenTree:
    """What follows each of `starts` (match length, position) in the source, the best `branches` as one tree.

    The first branch takes what nodes it can; the others get half of what is left. A longer match is more confident.
    """
    tokens: list[int] = []
    parents: list[int] = []
    confidence: list[float] = []
    children: dict[tuple[int, int], int] = {}
    for length, start in list(starts)[:branches]:
        room = max_nodes - len(tokens)
        if tokens:
            room //= 2
        node = -1
        for token in index.ids[start : start + max_nodes]:
            child = children.get((node, token))
            if child is None:
                if room == 0:
                    break
                room -= 1
                child = children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                confidence.append(length / (length + 1))
            node = child
    return TokenTree(tuple(tokens), tuple(parents), tuple(confidence))
