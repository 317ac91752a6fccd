from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tomocpt_stream.curves import PERCENTILES, Ranking, Thresholds, best_row, rank, sweep
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.evaluation import evaluate
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]


def _line(x: Sequence[float] | Array, scores: Sequence[float] | Array | None = None) -> Picks:
    places = np.zeros((len(x), 3))
    places[:, 2] = x
    given = np.ones(len(x)) if scores is None else scores
    return Picks(places, np.array(given, np.float32), voxel_size=1.0, tomogram="a")


def _random(tomograms: int, seed: int = 0) -> tuple[dict[str, Picks], dict[str, Picks]]:
    """Return candidates with many equal scores, crowded enough for pairs to change, and a truth."""
    rng = np.random.default_rng(seed)
    picks, truth = {}, {}
    for name in (f"t{i}" for i in range(tomograms)):
        where, true = rng.uniform(0, 30, (80, 3)), rng.uniform(0, 30, (50, 3))
        scores = np.round(rng.random(80), 1 if seed else 2)
        picks[name] = Picks(where, scores.astype(np.float32), voxel_size=10.0, tomogram=name)
        truth[name] = Picks(true, np.ones(50, np.float32), voxel_size=10.0, tomogram=name)
    return picks, truth


@pytest.mark.parametrize("thresholds", ["scores", "percentiles", [0.25, 0.1, 2.0, -1.0]])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_row_is_what_matching_at_its_threshold_gives(thresholds: Any, seed: int) -> None:
    picks, truth = _random(3, seed)
    curve = sweep(picks, truth, tolerance=60, thresholds=thresholds, beta=2)
    assert (np.diff(curve["threshold"]) >= 0).all()
    for _, row in curve.iterrows():
        above = {name: table.above(float(row.threshold)) for name, table in picks.items()}
        found = evaluate(above, truth, tolerance=60).pooled
        assert (row.picks, row.tp, row.fp, row.fn) == (found.picks, found.tp, found.fp, found.fn)
        expected = [found.precision, found.recall, found.f1, found.fbeta(2), found.mean_distance, found.rmse]
        given = row[["precision", "recall", "f1", "fbeta", "mean_distance", "rmse"]]
        np.testing.assert_allclose(given.to_numpy(dtype=float), expected, rtol=1e-9)


def test_thresholds_leave_every_set_of_picks_once() -> None:
    curve = sweep(_line([0, 5, 9, 20], [0.5, 0.9, 0.5, 0.2]), _line([0, 20]), tolerance=1)
    assert curve["picks"].tolist() == [4, 3, 1]
    np.testing.assert_allclose(curve["threshold"], [0.2, 0.2, 0.5], atol=1e-6)
    assert curve["tp"].tolist() == [2, 1, 0]


def test_the_percentiles_are_those_of_the_paper() -> None:
    picks, truth = _random(2)
    curve = sweep(picks, truth, tolerance=60, thresholds="percentiles")
    assert (len(curve), PERCENTILES[0], PERCENTILES[-1], PERCENTILES[1] - PERCENTILES[0]) == (13, 2, 98, 8)
    pooled = np.concatenate([table.score for table in picks.values()])
    np.testing.assert_allclose(curve["threshold"], np.percentile(pooled, range(2, 99, 8)), rtol=1e-6)


def test_the_best_row_is_the_one_of_the_highest_threshold() -> None:
    # One hit of one, and two hits of four: the F1 of both is 2/3.
    picks = _line([0, 5, 6, 20], [0.9, 0.8, 0.7, 0.6])
    curve = sweep(picks, _line([0, 20]), tolerance=1)
    assert curve["f1"].tolist() == pytest.approx([2 / 3, 0.4, 0.5, 2 / 3])
    assert best_row(curve)["threshold"] == pytest.approx(0.8)
    assert best_row(sweep(picks, _line([0, 20]), tolerance=1, beta=2))["picks"] == 4


def test_average_precision_is_the_mean_over_the_truth() -> None:
    picks = _line([0, 50, 10, 60, 20], [0.9, 0.8, 0.7, 0.6, 0.6])
    # Found at precisions 1, 2/3 and (with an equal score) 3/5; one is never found.
    assert rank(picks, _line([0, 10, 20, 30]), tolerance=1).average_precision() == pytest.approx(
        (1 + 2 / 3 + 3 / 5) / 4
    )
    assert rank(_line([]), _line([0]), tolerance=1).average_precision() == 0.0


def test_intervals_come_from_drawing_tomograms() -> None:
    picks, truth = _random(6)
    ranking = rank(picks, truth, tolerance=60)
    found = ranking.intervals(0.5, resamples=200, seed=3)
    assert found == ranking.intervals(0.5, resamples=200, seed=3)
    assert found != ranking.intervals(0.5, resamples=200, seed=4)
    above = {name: table.above(0.5) for name, table in picks.items()}
    pooled = evaluate(above, truth, tolerance=60).pooled
    assert found["precision"].value == pytest.approx(pooled.precision)
    assert found["fbeta"].value == pytest.approx(pooled.f1)
    assert found["average_precision"].value == pytest.approx(ranking.average_precision())
    for one in found.values():
        assert one.low < one.value < one.high
    # Drawn by hand: every resample is a table of so many copies of each tomogram.
    draws = np.random.default_rng(3).multinomial(6, [1 / 6] * 6, 200)
    matches = list(evaluate(above, truth, tolerance=60).matches.values())
    recalls = draws @ [one.tp for one in matches] / (50 * 6)
    np.testing.assert_allclose(
        (found["recall"].low, found["recall"].high), np.percentile(recalls, (2.5, 97.5))
    )


def test_the_average_precision_of_a_draw_is_that_of_copies() -> None:
    picks, truth = _random(3, seed=1)
    ranking = rank(picks, truth, tolerance=60)
    drawn = ("t0", "t2", "t2")
    copies = rank(
        {f"{i}": picks[name] for i, name in enumerate(drawn)},
        {f"{i}": truth[name] for i, name in enumerate(drawn)},
        tolerance=60,
    )
    found = ranking._average_precisions(np.array([[1.0, 0.0, 2.0]]))
    assert found[0] == pytest.approx(copies.average_precision())


def test_one_tomogram_has_no_interval() -> None:
    picks, truth = _random(1)
    for one in rank(picks, truth, tolerance=60).intervals(0.5, resamples=10).values():
        assert one.value > 0
        assert np.isnan(one.low)
        assert np.isnan(one.high)


@pytest.mark.parametrize("truth", [_line([]), _line([0.0])])
def test_nothing_picked_is_defined(truth: Picks) -> None:
    both: tuple[Thresholds, ...] = ("scores", "percentiles")
    for thresholds in both:
        curve = sweep(_line([]), truth, tolerance=1, thresholds=thresholds)
        row = best_row(curve)
        assert (row["picks"], row["tp"], row["fn"], row["fbeta"]) == (0, 0, len(truth), 0.0)
        assert np.isnan(row["mean_distance"])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(PlanError, match="thresholds='all'"):
        sweep(_line([0]), _line([0]), tolerance=1, thresholds="all")  # type: ignore[arg-type]
    for wrong in ([], [0.5, float("nan")]):
        with pytest.raises(PlanError, match="finite numbers"):
            sweep(_line([0]), _line([0]), tolerance=1, thresholds=wrong)
    with pytest.raises(SourceError, match="2 of 3 picks without a finite score"):
        rank(_line([0, 1, 2], [0.5, float("nan"), float("inf")]), _line([0]), tolerance=1)
    for beta in (float("nan"), float("inf"), 0.0, 1e200):
        with pytest.raises(PlanError, match="beta"):
            sweep(_line([0]), _line([0]), tolerance=1, beta=beta)
    with pytest.raises(PlanError, match="tolerance"):
        sweep(_line([0]), _line([0]), tolerance=-1)


def test_a_ranking_takes_scores_of_any_range() -> None:
    curve = sweep(_line([0, 9], [-3.0, 40.0]), _line([0]), tolerance=1)
    assert curve["tp"].tolist() == [1, 0]
    assert isinstance(rank(_line([0]), _line([0]), tolerance=1), Ranking)
