"""Scoring of the paper's experiments: one rule for everybody, each at its own best threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from orientations import rotation_error

from tomocpt_stream import Picks, match
from tomocpt_stream.curves import best_row, rank
from tomocpt_stream.evaluation import evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orientations import Array

    from tomocpt_stream.mask import MaskLike

SHIPPED = 0.3
"""The threshold a network is shipped with."""

LEVELS = [level / 10 for level in range(1, 10)]
"""Thresholds of the sweep's table."""

_CURVE = 200  # points of a curve that a row keeps


def scored(
    picks: Mapping[str, Picks],
    truth: Mapping[str, Picks],
    *,
    diameter: float,
    mask: Mapping[str, MaskLike] | None = None,
    group: Array | None = None,
) -> dict[str, Any]:
    """Return the figures of candidates at the threshold of their highest F1, all tomograms pooled.

    Picks and particles are matched one to one within half a diameter (Å). With a `mask` for each
    tomogram both sides are confined to it. `group` is the point group by which rotations are compared.
    """
    ranking = rank(picks, truth, tolerance=diameter / 2, mask=mask)
    curve = ranking.curve("scores")
    best = best_row(curve)
    threshold = float(best["threshold"])
    interval = ranking.intervals(threshold)["f1"]
    found = evaluate(
        {name: some.above(threshold) for name, some in picks.items()},
        truth,
        tolerance=diameter / 2,
        mask=mask,
    )
    distances = found.pooled.distances / diameter
    thinned = curve.iloc[np.unique(np.linspace(0, len(curve) - 1, _CURVE).astype(int))]
    return {
        "diameter": diameter,
        "truth": int(ranking.truth.sum()),
        "threshold": threshold,
        "picks": int(best["picks"]),
        "precision": float(best["precision"]),
        "recall": float(best["recall"]),
        "f1": float(best["f1"]),
        "interval": [interval.low, interval.high],
        "f1_of_tomograms": [one.f1 for one in found.matches.values()],
        "distances": [round(float(one), 4) for one in distances],
        "median_distance": float(np.median(distances)) if len(distances) else float("nan"),
        "mean_distance": float(distances.mean()) if len(distances) else float("nan"),
        "rotation_error": _rotation_error(picks, truth, threshold, diameter, group),
        "shipped": _at(ranking.curve([SHIPPED]).iloc[0]),
        "levels": [_at(at) for _, at in ranking.curve(LEVELS).iterrows()],
        "curve": [
            [float(v) for v in row] for row in thinned[["threshold", "precision", "recall", "f1"]].values
        ],
        "scores": [round(float(one), 4) for one in ranking.scores[:2000]],
    }


def _at(row: Any) -> dict[str, float]:
    return {name: float(row[name]) for name in ("picks", "precision", "recall", "f1")}


def _rotation_error(
    picks: Mapping[str, Picks],
    truth: Mapping[str, Picks],
    threshold: float,
    diameter: float,
    group: Array | None,
) -> float | None:
    """Return the median angle (degrees) between matched rotations; None where nobody gave any."""
    errors = []
    for name, true in truth.items():
        some = picks[name].above(threshold)
        if group is None or some.rotations is None or true.rotations is None:
            return None
        rows, columns = match(some, true, tolerance=diameter / 2).pairs.T
        errors.append(rotation_error(some.rotations[rows], true.rotations[columns], group))
    together = np.concatenate(errors)
    return float(np.median(together)) if len(together) else None
