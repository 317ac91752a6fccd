from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.evaluation import evaluate, match
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]


def _picks(zyx: Sequence[Sequence[float]] | Array, voxel_size: float | None = 10.0) -> Picks:
    points = np.asarray(zyx, dtype=np.float64).reshape(-1, 3)
    return Picks(points, np.ones(len(points), dtype=np.float32), voxel_size=voxel_size)


def _line(*x: float) -> Picks:
    return _picks([(0.0, 0.0, value) for value in x])


def _brute_force(left: Array, right: Array, tolerance: float) -> tuple[int, float]:
    """Return the most pairs that can be made and the least total distance of so many."""
    if len(left) > len(right):
        left, right = right, left
    apart = np.linalg.norm(left[:, None] - right[None], axis=2)
    for count in range(len(left), 0, -1):
        totals = [
            sum(apart[i, j] for i, j in zip(rows, columns, strict=True))
            for rows in combinations(range(len(left)), count)
            for columns in permutations(range(len(right)), count)
            if all(apart[i, j] <= tolerance for i, j in zip(rows, columns, strict=True))
        ]
        if totals:
            return count, min(totals)
    return 0, 0.0


@settings(max_examples=150, deadline=None)
@given(
    left=st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=5),
    right=st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=5),
    tolerance=st.floats(0.05, 7),
)
def test_the_assignment_is_the_best_there_is(left: list[Any], right: list[Any], tolerance: float) -> None:
    picks, truth = _picks(left, None), _picks(right, None)
    found = match(picks, truth, tolerance=tolerance)
    count, total = _brute_force(picks.zyx, truth.zyx, tolerance)
    assert found.tp == count
    assert found.distances.sum() == pytest.approx(total)
    assert len(set(found.pairs[:, 0])) == len(set(found.pairs[:, 1])) == count
    apart = np.linalg.norm(picks.zyx[found.pairs[:, 0]] - truth.zyx[found.pairs[:, 1]], axis=1)
    np.testing.assert_allclose(found.distances, apart)
    assert (found.distances <= tolerance * (1 + 1e-8)).all()
    assert (np.diff(found.pairs[:, 0]) > 0).all()


def test_a_far_pair_does_not_steal_a_near_one() -> None:
    # Without the gate the least total distance pairs 0-4 and 10-26 (20 voxels), not 0-26 and 10-4.
    found = match(_line(10, 0), _line(4, 26), tolerance=50)
    assert found.pairs.tolist() == [[1, 0]]
    assert (found.tp, found.fp, found.fn) == (1, 1, 1)


def test_number_goes_before_length() -> None:
    # The nearest pair (2-3) would leave both others alone.
    found = match(_line(2, 6), _line(3, 0), tolerance=40)
    assert found.pairs.tolist() == [[0, 1], [1, 0]]
    assert found.distances.tolist() == [20.0, 30.0]


def test_counts_ratios_and_distances() -> None:
    found = match(_line(0, 11, 50, 90), _line(1, 10, 53), tolerance=25)
    assert (found.tp, found.fp, found.fn) == (2, 2, 1)
    assert found.precision == 0.5
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(4 / 7)
    assert found.fbeta(4) == pytest.approx(17 * 2 / (17 * 2 + 16 * 1 + 2))
    assert found.mean_distance == 10.0
    wide = match(_line(0, 50), _line(1, 53), tolerance=30)
    assert wide.mean_distance == 20.0
    assert wide.rmse == pytest.approx(np.sqrt((100 + 900) / 2))


def test_distances_are_in_angstrom_of_each_side() -> None:
    picks = replace(_picks([(10.0, 20.0, 30.0)]), voxel_size=4.0)
    truth = replace(_picks([(5.0, 10.0, 16.0)]), voxel_size=8.0)
    assert match(picks, truth, tolerance=8.0).mean_distance == 8.0
    assert match(picks, truth, tolerance=7.9).tp == 0


def test_exactly_the_tolerance_is_a_pair_whatever_the_rounding() -> None:
    for voxel_size in (10.012, 13.48, 7.84, 0.1):
        picks = _picks([(0.0, 0.0, 100.1 + i) for i in range(0, 500, 10)], voxel_size)
        truth = _picks([(0.0, 3.0, 104.1 + i) for i in range(0, 500, 10)], voxel_size)
        assert match(picks, truth, tolerance=5 * voxel_size).tp == 50


@pytest.mark.parametrize(("left", "right"), [((), (1, 2)), ((1, 2, 3), ()), ((), ())])
def test_empty_sides_are_defined(left: tuple[float, ...], right: tuple[float, ...]) -> None:
    found = match(_line(*left), _line(*right), tolerance=10)
    assert (found.tp, found.fp, found.fn) == (0, len(left), len(right))
    assert found.precision == found.recall == found.f1 == 0.0
    assert np.isnan(found.mean_distance)
    assert np.isnan(found.rmse)
    assert found.pairs.shape == (0, 2)


def test_a_set_matches_itself_at_zero_distance() -> None:
    points = _picks(np.random.default_rng(0).uniform(0, 50, (300, 3)))
    found = match(points, points, tolerance=200)
    assert found.pairs.tolist() == [[i, i] for i in range(300)]
    assert found.f1 == 1.0
    assert found.rmse == 0.0
    assert match(points, points, tolerance=0).tp == 300


def test_the_answer_does_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(4)
    left, right = rng.uniform(0, 30, (200, 3)), rng.uniform(0, 30, (150, 3))
    first = match(_picks(left), _picks(right), tolerance=40)
    shuffle = rng.permutation(200)
    second = match(_picks(left[shuffle]), _picks(right), tolerance=40)
    again = [[int(shuffle[i]), int(j)] for i, j in second.pairs]
    assert sorted(again) == first.pairs.tolist()


def test_a_jittered_lattice_is_matched_point_by_point() -> None:
    rng = np.random.default_rng(1)
    truth = np.argwhere(np.ones((12, 12, 12), dtype=bool)) * 15.0
    order = rng.permutation(len(truth))
    found = match(_picks((truth + rng.uniform(-2, 2, truth.shape))[order]), _picks(truth), tolerance=100)
    np.testing.assert_array_equal(found.pairs[:, 1], order)


def test_units_must_agree() -> None:
    with pytest.raises(SourceError, match="truth without a voxel size"):
        match(_line(1), replace(_line(1), voxel_size=None), tolerance=1)
    with pytest.raises(SourceError, match="picks without a voxel size"):
        match(replace(_line(1), voxel_size=None), _line(1), tolerance=1)
    nothing = replace(_line(), voxel_size=None)
    assert match(nothing, _line(1), tolerance=1).fn == match(_line(1), nothing, tolerance=1).fp == 1


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_tolerances_without_sense_are_refused(tolerance: float) -> None:
    with pytest.raises(PlanError, match="tolerance"):
        match(_line(1), _line(1), tolerance=tolerance)


def test_a_crowd_without_sense_is_refused_before_memory_is_spent() -> None:
    crowd = _picks(np.random.default_rng(0).uniform(0, 1, (5000, 3)))
    with pytest.raises(PlanError, match="25,000,000 pairs of"):
        match(crowd, crowd, tolerance=1000)


def _named(**x: tuple[float, ...]) -> dict[str, Picks]:
    return {name: replace(_line(*places), tomogram=name) for name, places in x.items()}


def test_tomograms_are_matched_by_name_and_pooled() -> None:
    picks = _named(b=(0, 50), a=(1, 30, 70), only_picked=(3,))
    truth = _named(a=(0, 31, 90), b=(53,), only_true=(5, 6))
    found = evaluate(picks, truth, tolerance=30)
    assert list(found.matches) == ["a", "b", "only_true"]
    assert (found.without_picks, found.without_truth) == (("only_true",), ("only_picked",))
    assert (found.matches["a"].tp, found.matches["a"].fp, found.matches["a"].fn) == (2, 1, 1)
    assert (found.matches["only_true"].tp, found.matches["only_true"].fn) == (0, 2)
    pooled = found.pooled
    assert (pooled.tp, pooled.fp, pooled.fn) == (3, 2, 3)
    assert pooled.pairs.tolist() == [[0, 0], [1, 1], [4, 3]]
    assert pooled.mean_distance == pytest.approx((10 + 10 + 30) / 3)
    assert pooled.rmse == pytest.approx(np.sqrt((100 + 100 + 900) / 3))


def test_single_tables_belong_together_whatever_their_names() -> None:
    picks, truth = replace(_line(0), tomogram="rec_a"), replace(_line(1), tomogram="a")
    assert evaluate(picks, truth, tolerance=10).pooled.tp == 1
    with pytest.raises(SourceError, match="single table"):
        evaluate({"a": picks}, truth, tolerance=10)


def test_sides_without_a_common_name_are_refused_and_listed() -> None:
    with pytest.raises(SourceError, match=r"picks of rec_a, rec_b and truth of a: no tomogram has both"):
        evaluate(_named(rec_a=(0,), rec_b=(0,)), _named(a=(0,)), tolerance=10)
    with pytest.raises(SourceError, match=r"picks of nothing and truth of .*t9 and 2 more"):
        evaluate({}, _named(**{f"t{i}": (0,) for i in range(12)}), tolerance=10)


def test_a_mask_restricts_both_sides() -> None:
    mask = np.zeros((4, 4, 10), dtype=np.float32)
    mask[:, :, :5] = 1
    shape = (8, 8, 20)
    picks = replace(_picks([(1, 1, 2), (1, 1, 8.4), (1, 1, 8.6), (1, 1, 19)]), shape=shape, tomogram="a")
    truth = replace(_picks([(1, 1, 3), (1, 1, 18)]), shape=shape, tomogram="a")
    found = evaluate({"a": picks}, {"a": truth}, tolerance=20, mask={"a": mask}).pooled
    assert (found.tp, found.fp, found.fn) == (1, 1, 0)
    with pytest.raises(SourceError, match="no mask of a"):
        evaluate({"a": picks}, {"a": truth}, tolerance=20, mask={"b": mask})
