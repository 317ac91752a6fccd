"""Precision and recall over the threshold of the score, from candidates that no threshold has cut.

Every row of a curve is exact: as many pairs as possible among the picks above its threshold and the
truth, and of these the shortest, as if they had been matched alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.evaluation import edges_within, together
from tomocpt_stream.growth import grow
from tomocpt_stream.pairing import Edges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tomocpt_stream.mask import MaskLike
    from tomocpt_stream.picks import Picks

Floats = npt.NDArray[np.float64]
Thresholds = Literal["scores", "percentiles"]

# The paper's: 2 to 98 in steps of 8.
PERCENTILES = tuple(range(2, 99, 8))
RESAMPLES = 1000
_LEVEL = (2.5, 97.5)  # percentiles of the resamples that bound an interval


def sweep(
    picks: Picks | Mapping[str, Picks],
    truth: Picks | Mapping[str, Picks],
    *,
    tolerance: float,
    thresholds: Thresholds | Sequence[float] = "scores",
    beta: float = 1.0,
    mask: MaskLike | Mapping[str, MaskLike] | None = None,
) -> pd.DataFrame:
    """Match picks above each threshold with truth; return one row a threshold, the lowest first.

    `thresholds`: "scores" gives a row for each set of picks that a threshold can leave (each distinct
    score but the highest, and one below them all); "percentiles" those of the paper, of the pooled
    scores, 2 to 98 in steps of 8; or numbers. Picks count strictly above a threshold, as in
    `Picks.above`. Tomograms are pooled; what one side lacks is treated as in `evaluate`.

    Columns: threshold, picks, tp, fp, fn, precision, recall, f1, fbeta, mean_distance, rmse (Å; NaN
    without pairs, and where picks and truth are so crowded that least distances take too long).
    """
    return rank(picks, truth, tolerance=tolerance, mask=mask).curve(thresholds, beta=beta)


def best_row(curve: pd.DataFrame) -> pd.Series:
    """Return the row of the highest F-beta; of equal ones that of the highest threshold."""
    rows = np.flatnonzero(curve["fbeta"] == curve["fbeta"].max())
    return curve.iloc[int(rows[-1])]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its 95 % interval; these are NaN for a single tomogram."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Ranking:
    """All picks of some tomograms, best first, and what each adds to the best pairs of those before.

    `tomogram` is the number of each pick's tomogram, `gains` whether it adds a pair, `sums` and
    `squares` those of the pairs' distances once it is there. `truth` is the number of true particles in
    each tomogram.
    """

    scores: npt.NDArray[np.float32]
    tomogram: npt.NDArray[np.intp]
    gains: npt.NDArray[np.bool_]
    sums: Floats
    squares: Floats
    truth: npt.NDArray[np.intp]

    def curve(
        self, thresholds: Thresholds | Sequence[float] = "scores", *, beta: float = 1.0
    ) -> pd.DataFrame:
        """Return counts, ratios and distances at thresholds (see `sweep`)."""
        if not (np.isfinite(beta * beta) and beta > 0):
            raise PlanError(f"beta {beta}", expected="a positive number, not huge", remedy="1 is usual")
        cuts = self._thresholds(thresholds)
        picks = np.searchsorted(-self.scores, -cuts, side="left")
        tp, sums, squares = (
            np.concatenate([[0], column])[picks]
            for column in (np.cumsum(self.gains), self.sums, self.squares)
        )
        fn = int(self.truth.sum()) - tp
        with np.errstate(invalid="ignore"):
            distances = {"mean_distance": sums / tp, "rmse": np.sqrt(squares / tp)}
        ratios = _ratios(tp, picks, tp + fn, beta)
        counts = {"threshold": cuts, "picks": picks, "tp": tp, "fp": picks - tp, "fn": fn}
        return pd.DataFrame({**counts, **ratios, **distances})

    def average_precision(self) -> float:
        """Return the mean over the true particles of the precision at which each was found.

        That is the area under the steps of precision over recall, one step a distinct score, without
        interpolation; particles never found count as 0.
        """
        return float(self._average_precisions(np.ones((1, len(self.truth))))[0])

    def intervals(
        self, threshold: float, *, beta: float = 1.0, resamples: int = RESAMPLES, seed: int = 0
    ) -> dict[str, Interval]:
        """Return precision, recall, f1 and fbeta at a threshold and average_precision with 95 % intervals.

        The percentile bootstrap: tomograms are drawn with replacement, as many as there are, and
        pooled, `resamples` times. The threshold stays. With one tomogram the bounds are NaN.
        """
        tomograms = len(self.truth)
        draws = np.random.default_rng(seed).multinomial(tomograms, [1 / tomograms] * tomograms, resamples)
        weights = np.concatenate([np.ones((1, tomograms)), draws.astype(np.float64)])
        above = self.scores > np.float32(threshold)
        picks = np.bincount(self.tomogram[above], minlength=tomograms)
        tp = np.bincount(self.tomogram[above & self.gains], minlength=tomograms)
        found = _ratios(weights @ tp, weights @ picks, weights @ self.truth, beta)
        found["average_precision"] = self._average_precisions(weights)
        return {name: _interval(values, known=tomograms > 1) for name, values in found.items()}

    def _thresholds(self, thresholds: Thresholds | Sequence[float]) -> npt.NDArray[np.float32]:
        distinct = np.unique(self.scores)
        if isinstance(thresholds, str):
            if thresholds not in ("scores", "percentiles"):
                raise PlanError(
                    f"thresholds={thresholds!r}",
                    expected='"scores", "percentiles" or numbers',
                    remedy="choose one of them",
                )
            if not len(distinct):
                return np.zeros(1, dtype=np.float32)
            if thresholds == "scores":
                return np.concatenate([[np.nextafter(distinct[0], np.float32(-np.inf))], distinct[:-1]])
            thresholds = np.percentile(self.scores.astype(np.float64), PERCENTILES).tolist()
        cuts = np.sort(np.asarray(thresholds, dtype=np.float32))
        if not len(cuts) or not np.isfinite(cuts).all():
            raise PlanError(
                f"the thresholds {list(thresholds)}", expected="finite numbers", remedy="give at least one"
            )
        return cuts

    def _average_precisions(self, weights: Floats) -> Floats:
        """Return the average precision where each tomogram counts so many times (one row a resample)."""
        ends = np.flatnonzero(np.diff(self.scores, append=-np.inf))
        areas = np.zeros(len(weights))
        for row, weight in enumerate(weights):
            each = weight[self.tomogram]
            picks, tp = np.cumsum(each)[ends], np.cumsum(each * self.gains)[ends]
            steps = np.diff(tp, prepend=0.0)
            truth = float(weight @ self.truth)
            areas[row] = (steps[steps > 0] * (tp / np.maximum(picks, 1))[steps > 0]).sum() / max(truth, 1.0)
        return areas


def rank(
    picks: Picks | Mapping[str, Picks],
    truth: Picks | Mapping[str, Picks],
    *,
    tolerance: float,
    mask: MaskLike | Mapping[str, MaskLike] | None = None,
) -> Ranking:
    """Put the picks of all tomograms in one order, best first, and find what each adds.

    Raises SourceError and PlanError where `evaluate` does, and where a score is not finite.
    """
    tables = list(together(picks, truth, mask=mask).tables.values())
    counts = np.array([(len(some), len(true)) for some, true in tables])
    starts = np.cumsum([(0, 0), *counts], axis=0)
    found = [edges_within(some, true, tolerance) for some, true in tables]
    scores = np.concatenate([some.score for some, _ in tables])
    if wrong := int((~np.isfinite(scores)).sum()):
        raise SourceError(
            f"{wrong} of {len(scores)} picks without a finite score",
            expected="a number for each pick",
            remedy="leave those picks out",
        )
    order = np.argsort(-scores, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rows = place[np.concatenate([one.rows + start for one, start in zip(found, starts[:, 0], strict=False)])]
    columns = np.concatenate([one.columns + start for one, start in zip(found, starts[:, 1], strict=False)])
    lengths = np.concatenate([one.lengths for one in found])
    sort = np.lexsort((columns, rows))
    growth = grow(Edges(rows[sort], columns[sort], lengths[sort], (len(scores), int(starts[-1, 1]))))
    tomogram = np.repeat(np.arange(len(tables)), counts[:, 0])[order]
    return Ranking(scores[order], tomogram, growth.gains, growth.sums, growth.squares, counts[:, 1])


def _ratios(tp: npt.ArrayLike, picks: npt.ArrayLike, truth: npt.ArrayLike, beta: float) -> dict[str, Floats]:
    """Return precision, recall, f1 and fbeta; 0 without a denominator, as those of a `Match`."""
    hits, chosen, true = (np.asarray(part, dtype=np.float64) for part in (tp, picks, truth))
    f1, fbeta = (
        (1 + weight) * hits / np.maximum(weight * true + chosen, 1e-300) for weight in (1.0, beta * beta)
    )
    return {
        "precision": hits / np.maximum(chosen, 1e-300),
        "recall": hits / np.maximum(true, 1e-300),
        "f1": f1,
        "fbeta": fbeta,
    }


def _interval(values: Floats, *, known: bool) -> Interval:
    low, high = np.percentile(values[1:], _LEVEL) if known else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))
