"""How well picks agree with a truth: one-to-one pairs, counts, precision, recall, distances.

Pairs are assigned, not taken greedily: as many as possible within the tolerance and, among the ways
to do that, the one of least total distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.pairing import Edges, best_pairs

if TYPE_CHECKING:
    from tomocpt_stream.frame import Points
    from tomocpt_stream.picks import Picks

Indices = npt.NDArray[np.intp]
Distances = npt.NDArray[np.float64]

_SLACK = 1e-9  # of the tolerance: a pair at exactly the tolerance must not fail by rounding
_MOST_EDGES = 20_000_000  # of which each takes about 100 bytes


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
        The tolerance is negative or not finite, or more than 20 million pairs are within it.
    """
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise PlanError(
            f"a tolerance of {tolerance}",
            expected="a length of at least 0, in Å",
            remedy="half the particle's diameter is usual",
        )
    left, right = _positions(picks, truth)
    edges = _near(left, right, tolerance * (1 + _SLACK))
    chosen = best_pairs(edges)
    pairs = np.stack([edges.rows[chosen], edges.columns[chosen]], axis=1)
    return Match(pairs, edges.lengths[chosen], len(left), len(right))


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


def _near(left: Points, right: Points, tolerance: float) -> Edges:
    """Return all pairs within the tolerance."""
    if not len(left) or not len(right):
        return Edges(np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0), (len(left), len(right)))
    one, other = cKDTree(left), cKDTree(right)
    if (count := int(one.count_neighbors(other, tolerance))) > _MOST_EDGES:
        raise PlanError(
            f"{count:,} pairs of {len(left):,} picks and {len(right):,} particles within {tolerance:g}",
            expected=f"at most {_MOST_EDGES:,}: particles that stand at least a tolerance apart",
            remedy="check the tolerance (Å) and the voxel sizes of both sides",
        )
    found = one.sparse_distance_matrix(other, tolerance, output_type="ndarray")
    found = found[np.lexsort((found["j"], found["i"]))]
    rows, columns = found["i"].astype(np.intp), found["j"].astype(np.intp)
    return Edges(rows, columns, found["v"].astype(np.float64), (len(left), len(right)))
