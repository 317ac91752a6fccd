"""One-to-one pairs along weighted edges: as many as there can be, then of least total length.

Columns gain partners in rounds. A round is one search along the shortest alternating paths from all
rows that are alone; its trees do not meet, so each that reaches a column alone gives it a partner at
once. Prices kept over the rounds prove the sum of lengths to be the least for the columns served.
Which columns are best left alone is settled afterwards, in the part that they can reach, from their
side (Dulmage and Mendelsohn: no edge between that part and the rest is in any largest set).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

Indices = npt.NDArray[np.intp]
Lengths = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]

_FARTHER = 4.0  # how much farther than its last find a round looks, at first


@dataclass(frozen=True, eq=False)
class Edges:
    """The possible pairs: row, column and length (0 or more) of each, sorted by rows; each pair once."""

    rows: Indices
    columns: Indices
    lengths: Lengths
    shape: tuple[int, int]

    def turned(self) -> tuple[Edges, Indices]:
        """Return the edges with rows and columns exchanged, and which edge each of them was."""
        order = np.argsort(self.columns, kind="stable")
        return Edges(self.columns[order], self.rows[order], self.lengths[order], self.shape[::-1]), order

    def among(self, rows: Marks, columns: Marks) -> tuple[Edges, Indices]:
        """Return the edges between marked rows and columns, these counted anew, and which they were."""
        kept = np.flatnonzero(rows[self.rows] & columns[self.columns])
        row, column = np.cumsum(rows) - 1, np.cumsum(columns) - 1
        shape = (int(rows.sum()), int(columns.sum()))
        return Edges(row[self.rows[kept]], column[self.columns[kept]], self.lengths[kept], shape), kept


def best_pairs(edges: Edges) -> Indices:
    """Return which edges are taken, in their order: no row or column twice, most first, then shortest."""
    if not len(edges.rows):
        return np.zeros(0, dtype=np.intp)
    partner = _partners(edges)
    taken = partner[edges.columns] == edges.rows
    turned, order = edges.turned()
    columns, rows = _reached(turned, partner)
    part, kept = turned.among(columns, rows)
    taken &= ~rows[edges.rows]
    taken[order[kept]] = _partners(part)[part.columns] == part.rows
    chosen: Indices = np.flatnonzero(taken)
    return chosen


def _partners(edges: Edges) -> Indices:
    """Return the row of each column, or -1: as many as possible, and the shortest for these columns.

    A price a row and a price a column never exceed an edge's length together and make up that of each
    taken edge. Rows that are alone have the price 0, others at most 0: so no other pairs of the same
    columns are shorter.
    """
    count, width = edges.shape
    row_price, column_price = np.zeros(count), np.full(width, np.inf)
    np.minimum.at(column_price, edges.columns, edges.lengths)
    row_of, column_of = np.full(width, -1), np.full(count, -1)
    reach = np.inf
    while True:
        # A row leads to the partners of its columns, and to columns that are alone.
        node_of = np.where(row_of >= 0, row_of, count + np.arange(width))
        slack = (edges.lengths - row_price[edges.rows] - column_price[edges.columns]).clip(0)
        away, previous, root = _search(edges, node_of, slack, np.flatnonzero(column_of < 0), reach)
        found = np.flatnonzero((row_of < 0) & np.isfinite(away[count:]))
        if not len(found):
            if reach == np.inf:
                return row_of
            reach = reach * 8 if reach < slack.max(initial=0) else np.inf
            continue
        found = found[np.lexsort((away[count + found], root[count + found]))]
        found = found[np.flatnonzero(np.diff(root[count + found], prepend=-1))]
        farthest = away[count + found].max()
        away = np.minimum(away, farthest)
        row_price -= away[:count]
        column_price += away[node_of]
        reach = _FARTHER * farthest or reach
        _exchange(found, previous, row_of, column_of)


def _search(
    edges: Edges, node_of: Indices, slack: Lengths, sources: Indices, reach: float
) -> tuple[Lengths, Indices, Indices]:
    """Return how far each node is from the nearest source, the node before it, and that source."""
    nodes = sum(edges.shape)
    near = slice(None) if reach == np.inf else np.flatnonzero(slack <= reach)
    starts = np.searchsorted(edges.rows[near], np.arange(nodes + 1)).astype(np.int32)
    targets = node_of[edges.columns[near]].astype(np.int32)
    graph = csr_array((slack[near], targets, starts), (nodes, nodes))
    away, previous, root = dijkstra(
        graph, indices=sources, min_only=True, return_predecessors=True, limit=reach
    )
    return away, previous.astype(np.intp), root


def _exchange(columns: Indices, previous: Indices, row_of: Indices, column_of: Indices) -> None:
    """Pair each column with the row before it on its path, that row's old column with the next, and so on."""
    row = previous[len(column_of) + columns]
    while len(columns):
        before = column_of[row]
        row_of[columns], column_of[row] = row, columns
        going = before >= 0
        columns, row = before[going], previous[row[going]]


def _reached(edges: Edges, column_of: Indices) -> tuple[Marks, Marks]:
    """Return the rows and the columns on alternating paths from the rows that are alone."""
    count, width = edges.shape
    row_of = np.full(width, -1)
    row_of[column_of[column_of >= 0]] = np.flatnonzero(column_of >= 0)
    node_of = np.where(row_of >= 0, row_of, count + np.arange(width))
    alone = np.flatnonzero(column_of < 0)
    away, _, _ = _search(edges, node_of, np.zeros(len(edges.rows)), alone, np.inf)
    return np.isfinite(away[:count]), np.isfinite(away[node_of])
