"""The score of the CZII challenge (Kaggle, 2024) as its rules count, which is not as `match` does.

A pick is near a particle within half the particle's radius. Hits are particles with a pick near, each
once; all other picks are false, so that a second pick on a particle is. Nothing is assigned: a single
pick near two particles hits both, and precision may exceed 1 then. Counts are pooled over the
tomograms, F-beta (beta 4) is taken for each kind of particle that the truth has, and their mean is
weighted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy.spatial import cKDTree

from tomocpt_stream.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tomocpt_stream.picks import Picks

BETA = 4.0
_SLACK = 1e-9  # of the distance: Å that were voxels in between must not fail by rounding


@dataclass(frozen=True)
class Kind:
    """One kind of particle: its radius in Å and the weight of its score."""

    radius: float
    weight: float


KINDS = {
    "apo-ferritin": Kind(60.0, 1.0),
    "beta-amylase": Kind(65.0, 0.0),
    "beta-galactosidase": Kind(90.0, 2.0),
    "ribosome": Kind(150.0, 1.0),
    "thyroglobulin": Kind(130.0, 2.0),
    "virus-like-particle": Kind(135.0, 1.0),
}


@dataclass(frozen=True)
class KindScore:
    """The pooled counts of one kind; `fp` is below 0 where fewer picks than hits were made."""

    tp: int
    fp: int
    fn: int

    @property
    def precision(self) -> float:
        """Hits over picks; 0 without picks."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp > 0 else 0.0

    @property
    def recall(self) -> float:
        """Hits over true particles; 0 without any."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn > 0 else 0.0

    def fbeta(self, beta: float = BETA) -> float:
        """Return F-beta of the precision and the recall; 0 without hits."""
        weight, precision, recall = beta * beta, self.precision, self.recall
        below = weight * precision + recall
        return (1 + weight) * precision * recall / below if below else 0.0


@dataclass(frozen=True)
class ChallengeScore:
    """The counts of each kind, and the weighted mean F-beta of those that the truth has."""

    kinds: dict[str, KindScore]
    score: float


def challenge_score(
    picks: Mapping[str, Mapping[str, Picks]],
    truth: Mapping[str, Mapping[str, Picks]],
    *,
    kinds: Mapping[str, Kind] = KINDS,
    beta: float = BETA,
) -> ChallengeScore:
    """Score picks of several kinds: particle -> tomogram -> Picks, on both sides.

    Tomograms that the truth does not name for any kind are left out. A kind of which the truth has no
    particle is counted but has no part in the mean, as in the challenge.

    Raises SourceError for a kind that is not in `kinds`, weights of the kinds in the truth that sum to 0,
    or tables without a voxel size.
    """
    if strange := sorted({*picks, *truth} - {*kinds}):
        raise SourceError(
            f"particles called {', '.join(strange)}",
            expected=f"one of {', '.join(kinds)}",
            remedy="rename them, or pass kinds= with their radius and weight",
        )
    weights = {
        name: kind.weight for name, kind in kinds.items() if any(map(len, truth.get(name, {}).values()))
    }
    total = sum(weights.values())
    if not total > 0:
        raise SourceError(
            f"truth of {', '.join(weights) or 'no particle'}, with weights that sum to 0",
            expected="particles of a kind with a positive weight",
            remedy="add their truth, or weigh a kind",
        )
    tomograms = {name for tables in truth.values() for name in tables}
    scores = {
        name: _score(picks.get(name, {}), truth.get(name, {}), tomograms, kind.radius / 2)
        for name, kind in kinds.items()
    }
    mean = sum(weight * scores[name].fbeta(beta) for name, weight in weights.items()) / total
    return ChallengeScore(scores, mean)


def _score(
    picks: Mapping[str, Picks], truth: Mapping[str, Picks], tomograms: set[str], tolerance: float
) -> KindScore:
    made = sum(len(table) for name, table in picks.items() if name in tomograms)
    hits = sum(_hits(picks[name], true, tolerance) for name, true in truth.items() if name in picks)
    return KindScore(hits, made - hits, sum(map(len, truth.values())) - hits)


def _hits(picks: Picks, truth: Picks, tolerance: float) -> int:
    """Return how many true particles have a pick at most `tolerance` away."""
    if not len(picks) or not len(truth):
        return 0
    reach = tolerance * (1 + _SLACK)
    near = cKDTree(picks.angstrom()).query_ball_point(truth.angstrom(), reach, return_length=True)
    return int((near > 0).sum())
