"""A forward's attention, cut into work items for the GPU kernel; see `specgen.kernels.triton.tree_attention`.

A tile is a few rows of one sequence that are looked at together. Where there are fewer tiles than a GPU has room for,
each is cut along its keys too. A row of a tree is told which rows of its tail are ancestors by 64 bits.

`batch_invariant`: such a row is given its keys as they would lie had its path been committed, so that its bits are
those of plain decoding. Spans inside the committed prefix are shared with the rows beside it; the last ones it has to
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from specgen.kernels.triton.kv_splits import starts
from specgen.model.attention.reach import Reach
from specgen.model.segment import Segment

_BITS = 64
_NEVER = 2**31 - 1

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SplitPolicy:
    """How to cut. tile_rows: rows of a tile. programs: items that keep the GPU busy; more are not made by cutting along
    the keys. partials: the most partial sums that rows may leave, one per row and span."""

    tile_rows: int
    programs: int
    partials: int
    batch_invariant: bool = False

    def most_items(self, rows: int) -> int:
        """Of a forward over so many rows: a row is in one item or shares it, a tile of paths has one more for what they
        share, and cutting along the keys makes no more than `programs`."""
        return (1 + self.batch_invariant) * rows + self.programs


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What `WorkItems` holds, on the host: items [n, 11], rows [rows, 7], int32. partials: how many there are."""

    items: NDArray[np.int32]
    rows: NDArray[np.int32]
    partials: int


@dataclass(frozen=True, slots=True)
class _Sight:
    """What rows see: keys [first, seen), and behind them the tail rows `listed`, one array a row, counted from the
    prefix's end. Of the whole path the first key that is looked at is `first`."""

    first: Ints
    seen: Ints
    listed: list[Ints]

    def bits(self, row: int, prefix: int) -> int:
        """The listed rows that are looked at. Ancestors stand one a position, so it is all but the first few."""
        seen = int(self.seen[row])
        bits = 0
        for place in self.listed[row][max(0, int(self.first[row]) - seen) :].tolist():
            bits |= 1 << (prefix + place - seen)
        if bits >> _BITS:
            raise ValueError(f"row {row} has an ancestor more than {_BITS} rows behind what it sees at one stretch")
        return bits


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows [row, row + rows) over spans [span, stop); the fields of an item."""

    row: int
    rows: int
    low: int
    high: int
    pages: int
    span: int
    stop: int
    path_start: int = _NEVER
    path: int = 0
    shared: int = _NEVER


@dataclass(slots=True)
class Places:
    """The list of pages and paths that items point into."""

    numbers: list[int] = field(default_factory=list)
    _pages: dict[int, int] = field(default_factory=dict)

    def pages(self, segment: Segment) -> int:
        """Where the segment's pages stand."""
        key = id(segment)
        if key not in self._pages:
            self._pages[key] = self.put(segment.table.pages[: segment.table.pool.pages_for(segment.end)])
        return self._pages[key]

    def put(self, numbers: Sequence[int]) -> int:
        """Where `numbers` stand from now on."""
        place = len(self.numbers)
        self.numbers += numbers
        return place


def cut(segments: Sequence[Segment], reach: Reach, how: SplitPolicy, places: Places, rows: int) -> SplitPlan:
    """The work of a forward in layers that look back as far as `reach`.

    rows: of the whole forward; those behind the segments' are padding rows, and come out as zeros.
    """
    count = sum(len(segment.tokens) for segment in segments)
    cutter = _Cutter(how, np.zeros((rows, 7), dtype=np.int64))
    first_row = 0
    for segment in segments:
        cutter.add(segment, _sight(segment, reach), first_row, places)
        first_row += len(segment.tokens)
    return cutter.finish(range(count, rows, how.tile_rows))


class _Cutter:
    def __init__(self, how: SplitPolicy, rows: Ints) -> None:
        self._how = how
        self._rows = rows
        self._whole: list[_Tile] = []
        self._shared: list[_Tile] = []
        self._pieces: list[_Tile] = []
        self._partials = 0

    def add(self, segment: Segment, sight: _Sight, first_row: int, places: Places) -> None:
        """The rows of one segment."""
        edges = starts(segment.end)
        for begin in range(0, len(segment.tokens), self._how.tile_rows):
            rows = range(begin, min(begin + self._how.tile_rows, len(segment.tokens)))
            if self._how.batch_invariant and any(len(sight.listed[row]) for row in rows):
                self._add_paths(segment, sight, first_row, rows, edges, places)
            else:
                self._add_rows(segment, sight, first_row, rows, edges, places)

    def _add_rows(
        self, segment: Segment, sight: _Sight, first_row: int, rows: range, edges: Ints, places: Places
    ) -> None:
        """Rows that see the tail's rows where they lie."""
        low, high, shared = _NEVER, 0, _NEVER
        for row in rows:
            seen, bits = int(sight.seen[row]), sight.bits(row, segment.table.length)
            self._see(first_row + row, int(sight.first[row]), seen, bits)
            low, high = min(low, int(sight.first[row])), max(high, seen + bits.bit_length())
            shared = min(shared, seen) if bits else shared
        tile = _Tile(
            first_row + rows.start,
            len(rows),
            low,
            high,
            places.pages(segment),
            _span(edges, low),
            _span(edges, high - 1) + 1,
        )
        self._whole.append(replace(tile, shared=shared))

    def _add_paths(
        self, segment: Segment, sight: _Sight, first_row: int, rows: range, edges: Ints, places: Places
    ) -> None:
        """Rows that see their own paths: together as far as that is the committed prefix, then each alone."""
        low, common = int(sight.first[rows].min()), int(sight.seen[rows].min())
        lengths = [int(sight.seen[row]) + len(sight.listed[row]) for row in rows]
        span, alone = _span(edges, low), _span(edges, common)
        stops = [_span(edges, length - 1) + 1 for length in lengths]
        together = alone > span and self._leave(sum(stops) - span * len(rows))
        tile = _Tile(first_row + rows.start, len(rows), low, common, places.pages(segment), span, alone)
        if together:
            self._shared.append(tile)
        for row, length, stop in zip(rows, lengths, stops, strict=True):
            self._see(first_row + row, int(sight.first[row]), length, 0)
            own = replace(tile, row=first_row + row, rows=1, high=length, stop=stop)
            if len(sight.listed[row]):
                slots = segment.table.slots(segment.table.length, segment.end)[sight.listed[row]]
                own = replace(own, path_start=int(sight.seen[row]), path=places.put(slots.tolist()))
            if together:
                self._lay(own)
                self._pieces += _pieces(replace(own, span=alone), 1)
            else:
                self._whole.append(replace(own, low=int(sight.first[row]), span=_span(edges, int(sight.first[row]))))

    def finish(self, idle: range) -> SplitPlan:
        """All items. `idle`: where tiles of padding rows begin."""
        room = self._how.programs // max(1, len(self._whole) + len(self._shared))
        pieces = [piece for tile in self._shared for piece in _pieces(tile, max(1, room))] + self._pieces
        items = [_item(piece, whole=False) for piece in pieces]
        for tile in self._whole:
            spans = tile.stop - tile.span
            if room > 1 and spans > 1 and self._leave(spans * tile.rows):
                self._lay(tile)
                items += [_item(piece, whole=False) for piece in _pieces(tile, room)]
            else:
                items.append(_item(tile, whole=True))
        for row in idle:
            rows = min(self._how.tile_rows, len(self._rows) - row)
            items.append(_item(_Tile(row, rows, 0, 0, 0, 0, 0), whole=True))
        return SplitPlan(np.array(items, dtype=np.int32), self._rows.astype(np.uint32).view(np.int32), self._partials)

    def _see(self, row: int, first: int, seen: int, bits: int) -> None:
        self._rows[row, :4] = first, seen, bits & 0xFFFFFFFF, bits >> 32

    def _leave(self, partials: int) -> bool:
        """Whether there is room for so many partial sums more."""
        return self._partials + partials <= self._how.partials

    def _lay(self, tile: _Tile) -> None:
        """Give the tile's rows places for their partial sums."""
        spans = tile.stop - tile.span
        for row in range(tile.row, tile.row + tile.rows):
            self._rows[row, 4:] = tile.span, spans, self._partials
            self._partials += spans


def _sight(segment: Segment, reach: Reach) -> _Sight:
    prefix, tail, rows = segment.table.length, segment.tail, len(segment.tokens)
    positions = np.asarray(segment.new_positions)
    first = np.array([reach.oldest(int(p)) for p in positions])
    if segment.parents is None:
        return _Sight(first, np.arange(prefix + tail - rows, prefix + tail) + 1, [_NONE] * rows)
    straight, listed = _straight(segment.parents)
    return _Sight(first, prefix + np.array(straight[-rows:]), [np.array(row, dtype=np.int64) for row in listed[-rows:]])


def _straight(parents: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """For each tail row how many of its ancestors, itself among them, are the tail's first rows, and which others there
    are."""
    straight: list[int] = []
    listed: list[list[int]] = []
    for row, parent in enumerate(parents):
        before, rest = (straight[parent], listed[parent]) if parent >= 0 else (0, [])
        goes_on = before == row and not rest
        straight.append(before + goes_on)
        listed.append([] if goes_on else [*rest, row])
    return straight, listed


_NONE: Ints = np.empty(0, dtype=np.int64)


def _span(edges: Ints, key: int) -> int:
    """The span that holds a key."""
    return int(np.searchsorted(edges, key, side="right")) - 1


def _pieces(tile: _Tile, count: int) -> Iterator[_Tile]:
    """The tile's spans in at most `count` runs, as even as can be."""
    spans = tile.stop - tile.span
    edges = np.linspace(tile.span, tile.stop, min(count, spans) + 1).round().astype(int).tolist()
    for span, stop in pairwise(edges):
        yield replace(tile, span=span, stop=stop)


def _item(tile: _Tile, *, whole: bool) -> tuple[int, ...]:
    return (
        tile.row,
        tile.rows,
        tile.low,
        tile.high,
        tile.pages,
        tile.path_start,
        tile.path,
        tile.shared,
        tile.span,
        tile.stop - tile.span,
        int(whole),
    )
