"""How well picks agree with a truth: one-to-one pairs, counts, precision, recall, distances.

Pairs are assigned, not taken greedily: as many as possible within the tolerance and, among the ways
to do that, the one of least total distance. What no pair can connect is assigned apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array, hstack
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from tomocpt_stream.errors import PlanError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tomocpt_stream.frame import Points
    from tomocpt_stream.picks import Picks

Indices = npt.NDArray[np.intp]
Distances = npt.NDArray[np.float64]

_SLACK = 1e-9  # of the tolerance: a pair at exactly the tolerance must not fail by rounding
_DENSE = 1 << 22  # entries of the largest matrix of costs that is made


@dataclass(frozen=True, eq=False)
class Match:
    """The pairs between picks and truth, and what follows from their number and length.

    `pairs` is (n, 2), rows of the picks and of the truth, in the order of the picks; `distances` is
    (n,), in Å, or voxels where neither side has a voxel size. Ratios without a denominator
    are 0 (precision without picks, recall without truth), distances without pairs NaN.
    """

    pairs: Indices
    distances: Distances
    picks: int
    truth: int

    @property
    def tp(self) -> int:
        """Pairs."""
        return len(self.pairs)

    @property
    def fp(self) -> int:
        """Picks without a partner."""
        return self.picks - self.tp

    @property
    def fn(self) -> int:
        """True particles without a partner."""
        return self.truth - self.tp

    @property
    def precision(self) -> float:
        """Pairs over picks."""
        return self.tp / self.picks if self.picks else 0.0

    @property
    def recall(self) -> float:
        """Pairs over true particles."""
        return self.tp / self.truth if self.truth else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return self.fbeta(1.0)

    @property
    def mean_distance(self) -> float:
        """The mean distance of the pairs (paper equation 13, which calls it RMSE)."""
        return float(self.distances.mean()) if self.tp else float("nan")

    @property
    def rmse(self) -> float:
        """The root of the mean squared distance of the pairs."""
        return float(np.sqrt((self.distances**2).mean())) if self.tp else float("nan")

    def fbeta(self, beta: float) -> float:
        """Return F-beta: recall counts `beta` times as much as precision."""
        weight = beta * beta
        counts = (1 + weight) * self.tp + weight * self.fn + self.fp
        return (1 + weight) * self.tp / counts if counts else 0.0


def match(picks: Picks, truth: Picks, *, tolerance: float) -> Match:
    """Pair picks with true particles at most `tolerance` apart, each with one at most.

    Of all ways to make as many pairs as possible, the one with the least total distance is taken.
    `tolerance` is in Å; in voxels where neither side has a voxel size.

    Raises
    ------
    SourceError
        One side has a voxel size and the other has none.
    PlanError
        The tolerance is negative or not finite.
    """
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise PlanError(
            f"a tolerance of {tolerance}",
            expected="a length of at least 0, in Å",
            remedy="half the particle's diameter is usual",
        )
    left, right = _positions(picks, truth)
    rows, columns, distances = _near(left, right, tolerance * (1 + _SLACK))
    chosen = _assign(rows, columns, distances, len(left), len(right))
    chosen = chosen[np.argsort(rows[chosen])]
    pairs = np.stack([rows[chosen], columns[chosen]], axis=1)
    return Match(pairs, distances[chosen], len(left), len(right))


def _positions(picks: Picks, truth: Picks) -> tuple[Points, Points]:
    known = [table.voxel_size is not None for table in (picks, truth)]
    if not any(known):
        return picks.zyx, truth.zyx
    if not all(known):
        without = "truth" if known[0] else "picks"
        raise SourceError(
            f"the {without} without a voxel size, the other side with one",
            expected="voxel sizes on both sides, or on neither",
            remedy=f"read the {without} with voxel_size=",
        )
    return picks.angstrom(), truth.angstrom()


def _near(left: Points, right: Points, tolerance: float) -> tuple[Indices, Indices, Distances]:
    """Return the rows, columns and lengths of all pairs within the tolerance, by rows and columns."""
    if not len(left) or not len(right):
        return np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0)
    found = cKDTree(left).sparse_distance_matrix(cKDTree(right), tolerance, output_type="ndarray")
    found = found[np.lexsort((found["j"], found["i"]))]
    return found["i"].astype(np.intp), found["j"].astype(np.intp), found["v"].astype(np.float64)


def _assign(rows: Indices, columns: Indices, distances: Distances, left: int, right: int) -> Indices:
    """Return which of the possible pairs are made."""
    single_row, single_column = np.bincount(rows) == 1, np.bincount(columns) == 1
    alone = single_row[rows] & single_column[columns]
    chosen = [np.flatnonzero(alone)]
    rest = np.flatnonzero(~alone)
    for edges in _components(rows[rest], columns[rest] + left, left + right):
        members = rest[edges]
        chosen.append(members[_best(rows[members], columns[members], distances[members])])
    return np.concatenate(chosen)


def _components(rows: Indices, columns: Indices, nodes: int) -> Iterator[Indices]:
    """Yield the edges of each connected part of a graph."""
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(nodes, nodes))
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(labels[rows], kind="stable")
    ends = np.flatnonzero(np.diff(labels[rows][order], append=-1)) + 1
    start = 0
    for end in ends:
        yield order[start:end]
        start = int(end)


def _best(rows: Indices, columns: Indices, distances: Distances) -> Indices:
    """Return which edges of one connected part are taken: most first, then least total distance."""
    left, i = np.unique(rows, return_inverse=True)
    right, j = np.unique(columns, return_inverse=True)
    # A missing pair costs more than all distances together, so that none is left out to save length.
    apart = distances.max() * (min(len(left), len(right)) + 1) + 1.0
    if len(left) * len(right) <= _DENSE:
        costs = np.full((len(left), len(right)), apart)
        costs[i, j] = distances
        a, b = linear_sum_assignment(costs)
    else:
        # Each row may also take a column of its own, at the price of a missing pair. Edges must not be 0.
        near = csr_array((distances + 1.0, (i, j)), shape=(len(left), len(right)))
        own = csr_array((np.full(len(left), apart + 1.0), (np.arange(len(left)),) * 2))
        a, b = min_weight_full_bipartite_matching(hstack([near, own], format="csr"))
    partner = np.full(len(left), -1)
    partner[a] = b
    return np.flatnonzero(partner[i] == j)
