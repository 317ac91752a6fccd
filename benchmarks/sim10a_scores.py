"""Figures of the look-alikes' benchmark: thresholds, pooled F1 with its interval, distances."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from paper_scores import SHIPPED

from tomocpt_stream.curves import Interval, Ranking, best_row, rank
from tomocpt_stream.evaluation import evaluate, match

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from tomocpt_stream import Picks

RESAMPLES = 4000
_LEVEL = (2.5, 97.5)  # percentiles of the resamples that bound an interval
_CURVE = 150  # points of a curve that a row keeps

Counts = npt.NDArray[np.int64]


def zero_shot(
    picks: Picks, one_class: Picks, everything: Picks, *, diameter: float, precision: float
) -> dict[str, Any]:
    """Return the recall of a class at the threshold where picks are on any particle often enough.

    That is the lowest threshold whose picks have at least this `precision` against all particles; None
    stands where no threshold has it. Pairs are one to one, within half a diameter (Å). The highest F1 of
    the class and the curve of precision against all particles over recall of the class are given as well.
    """
    tolerance = diameter / 2
    every = rank(picks, everything, tolerance=tolerance).curve()
    own = rank(picks, one_class, tolerance=tolerance).curve()
    best = best_row(own)
    row: dict[str, Any] = {
        "truth": len(one_class),
        "candidates": len(picks),
        "highest_precision": float(every["precision"].max()),
        "f1": float(best["f1"]),
        "f1_threshold": float(best["threshold"]),
        "curve": _thinned(own["recall"], every["precision"]),
    }
    threshold = threshold_at_precision(every, precision)
    if threshold is None:
        return row | {"threshold": None}
    some = picks.above(threshold)
    found, of_all = (match(some, truth, tolerance=tolerance) for truth in (one_class, everything))
    return row | {
        "threshold": threshold,
        "picks": len(some),
        "precision": of_all.precision,
        "recall": found.recall,
        "recall_of_all": of_all.recall,
        "interval": list(share_interval(found.tp, len(one_class))),
    }


def threshold_at_precision(curve: pd.DataFrame, precision: float) -> float | None:
    """Return the lowest threshold of a curve with at least this precision; None where there is none."""
    enough = curve[(curve["precision"] >= precision) & (curve["picks"] > 0)]
    return float(enough["threshold"].min()) if len(enough) else None


def pooled(picks: Mapping[str, Picks], truth: Mapping[str, Picks], *, diameter: float) -> dict[str, Any]:
    """Return the figures of the picks of several tomograms as one, pairs within half a diameter (Å).

    `f1` is the highest over the threshold, which is chosen on these very tomograms; its interval is that
    of `interval_of_f1` at that threshold. `f1_elsewhere` has each tomogram at the threshold that is best
    for the others, which no particle of it has chosen. Distances are of the pairs at `f1`, in diameters.
    """
    ranking = rank(picks, truth, tolerance=diameter / 2)
    curve = ranking.curve()
    best = best_row(curve)
    threshold = float(best["threshold"])
    interval, fixed = (interval_of_f1(*counts_at(ranking, at)) for at in (threshold, SHIPPED))
    above = {name: some.above(threshold) for name, some in picks.items()}
    found = evaluate(above, truth, tolerance=diameter / 2)
    distances = found.pooled.distances / diameter
    return {
        "truth": int(ranking.truth.sum()),
        "tomograms": len(ranking.truth),
        "threshold": threshold,
        "precision": float(best["precision"]),
        "recall": float(best["recall"]),
        "f1": interval.value,
        "interval": [interval.low, interval.high],
        "f1_elsewhere": f1_elsewhere(picks, truth, tolerance=diameter / 2),
        "f1_calibrated": fixed.value,
        "interval_calibrated": [fixed.low, fixed.high],
        "f1_of_tomograms": {name: one.f1 for name, one in found.matches.items()},
        "median_distance": float(np.median(distances)) if len(distances) else None,
        "mean_distance": float(distances.mean()) if len(distances) else None,
        "average_precision": ranking.average_precision(),
        "curve": _thinned(curve["recall"], curve["precision"]),
    }


def counts_at(ranking: Ranking, threshold: float) -> tuple[Counts, Counts, Counts]:
    """Return for each tomogram its pairs, its false picks and its particles, at a threshold."""
    tomograms = len(ranking.truth)
    above = ranking.scores > np.float32(threshold)
    tp, wrong = (
        np.bincount(ranking.tomogram[above & kind], minlength=tomograms).astype(np.int64)
        for kind in (ranking.gains, ~ranking.gains)
    )
    return tp, wrong, ranking.truth.astype(np.int64)


def interval_of_f1(
    tp: Counts, wrong: Counts, truth: Counts, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the F1 of all tomograms together, with a 95 % interval over tomograms and particles.

    Tomograms are drawn with replacement, as many as there are. Of each that is drawn the particles are
    drawn with replacement, and the number of false picks is a Poisson variate of the mean that was found:
    they are few, and come independently. The threshold stays.
    """
    tp, wrong, truth = (np.asarray(part, dtype=np.int64) for part in (tp, wrong, truth))
    rng = np.random.default_rng(seed)
    count = len(truth)
    times = rng.multinomial(count, [1 / count] * count, resamples)
    found = np.divide(tp, truth, out=np.zeros(count), where=truth > 0)
    # A tomogram that was drawn c times gives c independent draws of its particles.
    hits = rng.binomial(times * truth, found).sum(axis=1)
    false = rng.poisson((times * wrong).astype(np.float64)).sum(axis=1)
    values = _f1(hits, false, (times * truth).sum(axis=1))
    low, high = _bounds(values)
    return Interval(float(_f1(tp.sum(), wrong.sum(), truth.sum())), low, high)


def share_interval(hits: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score, which holds for a dozen particles as well."""
    if not of:
        return (0.0, 1.0)
    share, z = hits / of, 1.96
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (max(0.0, middle - half), min(1.0, middle + half))


def f1_elsewhere(picks: Mapping[str, Picks], truth: Mapping[str, Picks], *, tolerance: float) -> float | None:
    """Return the pooled F1 where each tomogram has the threshold that is best for all the others.

    None for a single tomogram, which has no others.
    """
    if len(truth) < 2:
        return None
    hits = chosen = 0
    for name, true in truth.items():
        others = {other: part for other, part in truth.items() if other != name}
        best = best_row(rank(picks, others, tolerance=tolerance).curve())
        some = picks[name].above(float(best["threshold"]))
        hits += match(some, true, tolerance=tolerance).tp
        chosen += len(some)
    return float(_f1(hits, chosen - hits, sum(len(true) for true in truth.values())))


def _f1(hits: npt.ArrayLike, wrong: npt.ArrayLike, truth: npt.ArrayLike) -> npt.NDArray[np.float64]:
    twice = 2 * np.asarray(hits, dtype=np.float64)
    of = np.asarray(hits) + np.asarray(wrong) + np.asarray(truth)
    f1: npt.NDArray[np.float64] = np.divide(twice, of, out=np.zeros_like(twice), where=of > 0)
    return f1


def _bounds(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, _LEVEL)
    return float(low), float(high)


def _thinned(recall: pd.Series[float], precision: pd.Series[float]) -> list[list[float]]:
    """Return points (recall, precision) of a curve, not more than a picture shows."""
    rows = np.unique(np.linspace(0, len(recall) - 1, _CURVE).astype(int))
    return [[round(float(recall.iloc[row]), 4), round(float(precision.iloc[row]), 4)] for row in rows]
