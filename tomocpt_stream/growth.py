"""The best pairs of every beginning of a list: as many as there can be, then of least total length.

One row comes after the other and changes the pairs along one shortest alternating path (Hungarian
method). Rows that found no partner stay without one: how many pairs a beginning has is exact in
one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tomocpt_stream.pairing import Edges, Lengths, Marks

# Columns looked at while the shortest pairs are kept up to date: about 20 s.
_PATIENCE = 2_000_000


@dataclass(frozen=True, eq=False)
class Growth:
    """What each row of a list adds to the best pairs of itself and those before.

    `gains` says which rows add a pair. `sums` and `squares` are the sum of the pairs' lengths and of
    their squares after each row; NaN from where that would take too long, in a large crowd.
    """

    gains: Marks
    sums: Lengths
    squares: Lengths


def grow(edges: Edges, *, patience: int = _PATIENCE) -> Growth:
    """Add the rows of `edges` one by one; look at no more than `patience` columns for least lengths."""
    count = edges.shape[0]
    gains, sums, squares = np.zeros(count, dtype=bool), np.zeros(count), np.zeros(count)
    pairs = _Pairs(edges, patience)
    for row in range(count):
        gains[row] = pairs.add(row)
        sums[row], squares[row] = (pairs.sum, pairs.square) if pairs.patience > 0 else (np.nan, np.nan)
    return Growth(gains, sums.clip(0), squares.clip(0))


@dataclass(eq=False)
class _Pairs:
    """The pairs so far.

    The prices are those of the Hungarian method: a column's is at most 0, and 0 while it is alone.
    A row may also stay alone at the price of `apart`, which is more than pairs can save in length.
    """

    edges: Edges
    patience: int
    sum: float = 0.0
    square: float = 0.0
    _near: list[list[tuple[int, float]]] = field(init=False)
    _price: list[float] = field(init=False)
    _row_of: list[int] = field(init=False)
    _length_of: list[float] = field(init=False)
    _closed: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        edges, (count, width) = self.edges, self.edges.shape
        starts = np.searchsorted(edges.rows, np.arange(count + 1)).tolist()
        ends = list(zip(edges.columns.tolist(), edges.lengths.tolist(), strict=True))
        self._near = [ends[start:stop] for start, stop in pairwise(starts)]
        self._price, self._row_of, self._length_of = [0.0] * width, [-1] * width, [0.0] * width
        self._apart = (edges.lengths.max(initial=0.0) + 1.0) * (min(count, width) + 1)

    def add(self, row: int) -> bool:
        """Take one more row; return whether there is one more pair."""
        if not self._near[row]:
            return False
        return self._shortest(row) if self.patience > 0 else self._any(row)

    def _shortest(self, row: int) -> bool:
        """Change the pairs along the shortest path to a column that is alone, or leave one row alone.

        Paths are measured in lengths above the prices (Dijkstra); a row left alone adds `apart`.
        """
        price, row_of = self._price, self._row_of
        away: dict[int, float] = {}
        before: dict[int, tuple[int, float]] = {}
        settled: dict[int, float] = {}
        queue: list[tuple[float, int]] = []
        end, last, start, paid, i = self._apart, -1, -1, 0.0, row
        while True:
            for j, length in self._near[i]:
                at = length - paid - price[j]
                if at < away.get(j, end) and j not in settled:
                    away[j], before[j] = at, (start, length)
                    heappush(queue, (at, j))
            while queue and (queue[0][1] in settled or queue[0][0] > away[queue[0][1]]):
                heappop(queue)
            if not queue or queue[0][0] >= end:
                break
            at, start = heappop(queue)
            self.patience -= 1
            i = row_of[start]
            if i < 0:
                end, last = at, start
                break
            settled[start] = at
            paid = self._length_of[start] - price[start] - at
            if self._apart - paid < end:
                end, last = self._apart - paid, start
        for j, at in settled.items():
            price[j] += min(at - end, 0.0)
        return self._shift(row, last, before)

    def _any(self, row: int) -> bool:
        """Change the pairs along any path to a column that is alone; what leads to none is closed."""
        before: dict[int, tuple[int, float]] = {}
        waiting = [(row, -1)]
        while waiting:
            i, start = waiting.pop()
            for j, length in self._near[i]:
                if j in before or j in self._closed:
                    continue
                before[j] = start, length
                if self._row_of[j] < 0:
                    return self._shift(row, j, before)
                waiting.append((self._row_of[j], j))
        self._closed.update(before)
        return False

    def _shift(self, row: int, last: int, before: dict[int, tuple[int, float]]) -> bool:
        """Give each column of a path the row of the one before it, the first one `row`."""
        gained = last >= 0 and self._row_of[last] < 0
        while last >= 0:
            start, length = before[last]
            for old, sign in ((self._length_of[last], -1), (length, 1)):
                self.sum += sign * old
                self.square += sign * old * old
            self._length_of[last] = length
            self._row_of[last] = row if start < 0 else self._row_of[start]
            last = start
        return gained
