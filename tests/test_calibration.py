from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.volumes import MemoryVolume
from tomocpt_stream.blocks import Window
from tomocpt_stream.calibration import calibrate
from tomocpt_stream.crops import Example
from tomocpt_stream.targets import paint_box

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.frame import Box

SHAPE = (40, 60, 290)  # 42 windows: the last batch of them is not full
BOX: Box = (slice(0, SHAPE[0]), slice(0, SHAPE[1]), slice(0, SHAPE[2]))


class _Reader:
    """A picker whose scores are the intensities, as they are."""

    window = Window((32, 32, 64), (4, 4, 8))
    particle_radius = 10.0

    def score(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return batch

    def shifted(self, logits: float, **provenance: Any) -> tuple[float, Any]:
        return logits, provenance


def _balls(*kinds: tuple[float, list[list[int]]]) -> npt.NDArray[np.float32]:
    """Return a map of balls, each kind with the height that its centre has."""
    painted = [height * paint_box(centres, BOX, radius=10) for height, centres in kinds]
    highest: npt.NDArray[np.float32] = np.stack(painted).max(axis=0).astype(np.float32)
    return highest


def _calibrated(array: npt.NDArray[np.float32], centres: list[list[int]]) -> tuple[float, dict[str, Any]]:
    picker: Any = _Reader()
    done: Any = calibrate(
        picker, [Example(MemoryVolume(array, (-0.5, 0.0, 0.5)), np.array(centres, dtype=np.float64))]
    )
    shift, provenance = done
    return shift, provenance["calibration"]


TRUE = [[20, y, x] for x in (20, 60, 100, 140) for y in (15, 45)]
WEAK = [[20, 15, 180], [20, 45, 180]]


def test_calibration_moves_the_best_threshold_to_three_tenths() -> None:
    # Particles answer 0.8, something else answers 0.5; two particles answer less than that.
    other = [[20, 15, 220], [20, 45, 220], [20, 30, 240]]
    shift, record = _calibrated(_balls((0.8, TRUE), (0.5, other), (0.2, WEAK)), TRUE + WEAK)
    # Above 0.5 and below 0.8 eight of ten are found and nothing else.
    assert record["f1"] == pytest.approx(2 * 8 / (2 * 8 + 2))
    assert record["threshold"] == pytest.approx(0.645, abs=0.011)
    assert shift == pytest.approx(np.log(0.3 / 0.7) - np.log(record["threshold"] / (1 - record["threshold"])))
    assert record["particles"] == 10


def test_particles_outside_the_volume_count_neither_way() -> None:
    # The centre of one lies before the face: what is picked of it is no error, nor is it missed if not.
    beyond = [[20, 30, -3]]
    inside = TRUE + WEAK
    for height in (0.8, 0.0):
        _, record = _calibrated(_balls((0.8, inside), (height, beyond)), inside + beyond)
        assert (record["f1"], record["particles"]) == (1.0, 10)


def test_where_nothing_is_known_nothing_counts() -> None:
    # A place that may be a particle answers as particles do: not an error, for nobody says what it is.
    array = _balls((0.8, TRUE + WEAK), (0.8, [[20, 30, 230]]))
    places = np.array(TRUE + WEAK, dtype=np.float64)
    picker: Any = _Reader()
    for doubtful, f1 in ((np.zeros((0, 3)), 20 / 21), (np.array([[20.0, 30.0, 230.0]]), 1.0)):
        done: Any = calibrate(
            picker, [Example(MemoryVolume(array, (-0.5, 0.0, 0.5)), places, doubtful=doubtful)]
        )
        assert done[1]["calibration"]["f1"] == pytest.approx(f1)


def test_scores_stay_where_nothing_can_be_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tomocpt_stream"):
        shift, record = _calibrated(_balls((0.8, TRUE)), TRUE)
        assert (shift, record["remark"]) == (0.0, "8 validation particles, fewer than 10")
        shift, record = _calibrated(_balls((0.01, TRUE)), TRUE + WEAK)
        assert (shift, record["remark"]) == (0.0, "none of 10 validation particles found")
    assert "8 validation particles" in caplog.text
    assert "none of 10" in caplog.text
