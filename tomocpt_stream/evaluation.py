"""How well picks agree with a truth: one-to-one pairs, counts, precision, recall, distances.

Pairs are assigned, not taken greedily: as many as possible within the tolerance and, among the ways
to do that, the one of least total distance. Tomograms belong together by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.mask import inside
from tomocpt_stream.pairing import Edges, best_pairs
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tomocpt_stream.frame import Points
    from tomocpt_stream.mask import MaskLike

Indices = npt.NDArray[np.intp]
Distances = npt.NDArray[np.float64]

_SLACK = 1e-9  # of the tolerance: a pair at exactly the tolerance must not fail by rounding
_NAMED = 10  # tomograms that an error lists
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
        One side has a voxel size and the other, which is not empty, has none.
    PlanError
        The tolerance is negative or not finite, or more than 20 million pairs are within it.
    """
    edges = edges_within(picks, truth, tolerance)
    chosen = best_pairs(edges)
    pairs = np.stack([edges.rows[chosen], edges.columns[chosen]], axis=1)
    return Match(pairs, edges.lengths[chosen], len(picks), len(truth))


def edges_within(picks: Picks, truth: Picks, tolerance: float) -> Edges:
    """Return all pairs of picks and true particles at most `tolerance` (Å) apart; raise as `match` does."""
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise PlanError(
            f"a tolerance of {tolerance}",
            expected="a length of at least 0, in Å",
            remedy="half the particle's diameter is usual",
        )
    left, right = _positions(picks, truth)
    return _near(left, right, tolerance * (1 + _SLACK))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well the picks of some tomograms agree with their truth.

    `matches` holds each tomogram that has a truth. `without_picks` names those whose particles all
    count as missed because nothing was picked there; `without_truth` those whose picks count neither
    way, because nobody says what is in them.
    """

    matches: dict[str, Match]
    without_picks: tuple[str, ...]
    without_truth: tuple[str, ...]

    @property
    def pooled(self) -> Match:
        """All tomograms as one: `pairs` are rows of their tables laid one after the other."""
        matches = list(self.matches.values())
        ends = np.cumsum([(0, 0), *((one.picks, one.truth) for one in matches)], axis=0)
        pairs = [one.pairs + start for one, start in zip(matches, ends[:-1], strict=True)]
        distances = np.concatenate([one.distances for one in matches])
        return Match(np.concatenate(pairs), distances, int(ends[-1, 0]), int(ends[-1, 1]))


@dataclass(frozen=True, eq=False)
class Together:
    """The picks and the truth of each tomogram that has a truth, and the names that only one side has."""

    tables: dict[str, tuple[Picks, Picks]]
    without_picks: tuple[str, ...]
    without_truth: tuple[str, ...]


def evaluate(
    picks: Picks | Mapping[str, Picks],
    truth: Picks | Mapping[str, Picks],
    *,
    tolerance: float,
    mask: MaskLike | Mapping[str, MaskLike] | None = None,
) -> Evaluation:
    """Match the picks of several tomograms with their truth, tomogram by tomogram (see `match`).

    `picks` and `truth` map names of tomograms to tables. Tomograms without truth are left out, those
    without picks are missed whole; both are named. With `mask` (one, or one for each tomogram that has
    a truth) picks and particles outside are left out first, on both sides.

    Raises SourceError where no tomogram has both, and where a mask is missing or does not fit.
    """
    joined = together(picks, truth, mask=mask)
    matches = {name: match(some, true, tolerance=tolerance) for name, (some, true) in joined.tables.items()}
    return Evaluation(matches, joined.without_picks, joined.without_truth)


def together(
    picks: Picks | Mapping[str, Picks],
    truth: Picks | Mapping[str, Picks],
    *,
    mask: MaskLike | Mapping[str, MaskLike] | None = None,
) -> Together:
    """Bring picks and truth of the same tomograms together (see `evaluate`).

    Two single tables belong together whatever their names.
    """
    if isinstance(picks, Picks) and isinstance(truth, Picks):
        picks, truth = {truth.tomogram: picks}, {truth.tomogram: truth}
    if isinstance(picks, Picks) or isinstance(truth, Picks):
        raise SourceError(
            "a single table on one side and a mapping of tomograms on the other",
            expected="two tables, or two mappings from names to tables",
            remedy="pass {name: table}",
        )
    if not picks.keys() & truth.keys():
        raise SourceError(
            f"picks of {_listed(picks)} and truth of {_listed(truth)}: no tomogram has both",
            expected="tomograms of the same names on both sides",
            remedy="rename them on one side",
        )
    tables = {name: (picks.get(name, true.take(np.zeros(0, np.intp))), true) for name, true in truth.items()}
    if mask is not None:
        tables = {
            name: (some.take(inside(some, one)), true.take(inside(true, one)))
            for (name, (some, true)), one in zip(tables.items(), _masks(mask, list(tables)), strict=True)
        }
    return Together(
        tables,
        tuple(name for name in truth if name not in picks),
        tuple(name for name in picks if name not in truth),
    )


def _masks(mask: MaskLike | Mapping[str, MaskLike], names: list[str]) -> list[MaskLike]:
    if not isinstance(mask, Mapping):
        return [mask] * len(names)
    if missing := [name for name in names if name not in mask]:
        raise SourceError(
            f"no mask of {_listed(missing)}",
            expected="one mask for each tomogram that has a truth",
            remedy="add it, or leave the tomogram out",
        )
    return [mask[name] for name in names]


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(name or "a tomogram without a name" for name in found[:_NAMED]) + more or "nothing"


def _positions(picks: Picks, truth: Picks) -> tuple[Points, Points]:
    known = [table.voxel_size is not None for table in (picks, truth)]
    if not any(known) or not len(picks) or not len(truth):
        return picks.zyx, truth.zyx  # of nothing there is no distance
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
