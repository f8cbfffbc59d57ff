"""The suffix automaton of a text (Blumer et al. 1985), with the number of times that each of its substrings occurs."""

from __future__ import annotations

from collections.abc import Iterable

ROOT = 0
_COUNTED = 16
"""Only text that repeats one thing over and over has substrings that end in more states than these."""


class SuffixAutomaton:
    """Grows at its end by one token in amortised constant time; at most two states per token.

    A state stands for the substrings of the text that end at the same places. Per state:
    next: token -> state of the substrings that are longer by this token, as often as they occur.
    link: state of the longest suffix that also occurs elsewhere; -1 for the root.
    length: tokens of its longest substring.
    count: at how many places its substrings end. Of a suffix that is in more than 16 states, the longest are counted.
    """

    def __init__(self, text: Iterable[int] = ()) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self._last = ROOT
        self.extend(text)

    @property
    def repeated(self) -> int:
        """The state of the longest suffix of the whole text that occurs elsewhere in it too; its `length` is exact."""
        return max(self.link[self._last], ROOT)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self._append(token)

    def follow(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """From a suffix of some text, `matched` tokens long, to the longest one that still occurs here once `token`
        came: its state and length."""
        while token not in self.next[state]:
            if state == ROOT:
                return ROOT, 0
            state = self.link[state]
            matched = self.length[state]
        return self.next[state][token], matched + 1

    def _append(self, token: int) -> None:
        follow, link, length = self.next, self.link, self.length
        state, self._last = self._last, len(follow)
        self._add({}, ROOT, length[state] + 1, 0)
        while state >= 0 and token not in follow[state]:
            follow[state][token] = self._last
            state = link[state]
        if state >= 0:
            target = follow[state][token]
            link[self._last] = target if length[target] == length[state] + 1 else self._split(state, token, target)
        self._count()

    def _split(self, state: int, token: int, target: int) -> int:
        """The shorter substrings of `target` end at one place more from now on: a state of their own."""
        clone = len(self.next)
        self._add(self.next[target].copy(), self.link[target], self.length[state] + 1, self.count[target])
        self.link[target] = clone
        while state >= 0 and self.next[state].get(token) == target:
            self.next[state][token] = clone
            state = self.link[state]
        return clone

    def _add(self, follow: dict[int, int], link: int, length: int, count: int) -> None:
        self.next.append(follow)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)

    def _count(self) -> None:
        state, link, count = self._last, self.link, self.count
        for _ in range(_COUNTED):
            if state <= ROOT:
                return
            count[state] += 1
            state = link[state]
