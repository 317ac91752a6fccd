from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tomocpt_stream.challenge import KINDS, Kind, challenge_score
from tomocpt_stream.errors import SourceError
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Sequence

VOXEL = 10.0


def _at(*x: float) -> Picks:
    """Return points along x, in Å."""
    places = np.zeros((len(x), 3))
    places[:, 2] = np.array(x) / VOXEL
    return Picks(places, np.ones(len(x), np.float32), voxel_size=VOXEL)


def _points(x: Sequence[float]) -> dict[str, Picks]:
    return {"TS_1": _at(*x)}


def test_the_kinds_are_those_of_the_challenge() -> None:
    assert {name: (kind.radius, kind.weight) for name, kind in KINDS.items()} == {
        "apo-ferritin": (60, 1),
        "beta-amylase": (65, 0),
        "beta-galactosidase": (90, 2),
        "ribosome": (150, 1),
        "thyroglobulin": (130, 2),
        "virus-like-particle": (135, 1),
    }


def test_a_worked_example() -> None:
    truth = {
        "apo-ferritin": {"TS_1": _at(0, 1000, 2000), "TS_2": _at(0)},
        "ribosome": {"TS_1": _at(0, 1000)},
        "beta-galactosidase": {"TS_1": _at(500)},
        "beta-amylase": {"TS_2": _at(500)},
    }
    picks = {
        # within 30 Å: at exactly 30 of the first one, twice on the second; 31 Å from the third
        "apo-ferritin": {"TS_1": _at(30, 990, 1010, 2031), "TS_2": _at(5), "TS_9": _at(1, 2, 3)},
        "ribosome": {"TS_1": _at(75, 1076), "TS_2": _at(0)},
        "beta-galactosidase": {"TS_2": _at(500)},
        "thyroglobulin": {"TS_1": _at(1)},
        "beta-amylase": {"TS_2": _at(500)},
    }
    found = challenge_score(picks, truth)
    counts = {name: (one.tp, one.fp, one.fn) for name, one in found.kinds.items()}
    assert counts == {
        "apo-ferritin": (3, 2, 1),
        "ribosome": (1, 2, 1),
        "beta-galactosidase": (0, 1, 1),
        "thyroglobulin": (0, 1, 0),
        "virus-like-particle": (0, 0, 0),
        "beta-amylase": (1, 0, 0),
    }
    # F = 17 p r / (16 p + r): p = 3/5, r = 3/4 gives 7.65/10.35 = 17/23; p = 1/3, r = 1/2 gives 17/35.
    assert found.kinds["apo-ferritin"].fbeta() == pytest.approx(17 / 23)
    assert found.kinds["ribosome"].fbeta() == pytest.approx(17 / 35)
    # Weights 1, 1 and 2 (0 for the amylase, which is perfect; no part for the kinds without truth).
    assert found.score == pytest.approx((17 / 23 + 17 / 35) / 4)


def test_everything_right_is_1_for_the_kinds_that_are_there() -> None:
    all_kinds = {name: _points([0, 1000]) for name in KINDS}
    assert challenge_score(all_kinds, all_kinds).score == pytest.approx(1.0)
    some = {name: table for name, table in all_kinds.items() if name != "thyroglobulin"}
    assert challenge_score(some, all_kinds).score == pytest.approx(5 / 7)
    assert challenge_score({}, all_kinds).score == 0.0


@pytest.mark.parametrize("nothing", [{}, {"thyroglobulin": _points([])}])
def test_a_kind_without_truth_has_no_part_in_the_mean(nothing: dict[str, dict[str, Picks]]) -> None:
    picks = {"ribosome": _points([0, 500]), "thyroglobulin": _points([0])}
    found = challenge_score(picks, {"ribosome": _points([0]), **nothing})
    assert found.kinds["thyroglobulin"].fp == 1
    assert found.score == pytest.approx(17 / 18)


def test_exactly_half_the_radius_is_near_whatever_the_voxels() -> None:
    places = np.zeros((500, 3))
    places[:, 2] = np.arange(500) * 1000.1
    truth = Picks(places / 10.012, np.ones(500, np.float32), voxel_size=10.012)
    picks = Picks((places + np.array([0, 0, 30])) / 10.012, np.ones(500, np.float32), voxel_size=10.012)
    assert challenge_score({"apo-ferritin": {"a": picks}}, {"apo-ferritin": {"a": truth}}).score == 1.0


def test_one_pick_near_two_particles_hits_both() -> None:
    kinds = {"a": Kind(100.0, 1.0)}
    one = challenge_score({"a": _points([0])}, {"a": _points([-40, 40])}, kinds=kinds).kinds["a"]
    assert (one.tp, one.fp, one.fn) == (2, -1, 0)
    assert one.precision == 2.0
    assert one.fbeta() == pytest.approx(17 * 2 / 33)


def test_unknown_kinds_and_weights_without_sense_are_refused() -> None:
    with pytest.raises(SourceError, match="particles called spike; expected one of apo-ferritin"):
        challenge_score({"spike": _points([0])}, {"ribosome": _points([0])})
    with pytest.raises(SourceError, match="truth of a, with weights"):
        challenge_score({}, {"a": _points([0])}, kinds={"a": Kind(10.0, 0.0), "b": Kind(10.0, 1.0)})
    with pytest.raises(SourceError, match="truth of no particle"):
        challenge_score({"ribosome": _points([0])}, {})
