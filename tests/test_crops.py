from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import (
    Augmentation,
    Example,
    Sampling,
    augment,
    check_examples,
    draw_batch,
    example,
    read_crop,
)
from tomocpt_stream.errors import SourceError
from tomocpt_stream.picks import Picks
from tomocpt_stream.targets import paint_box
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.volume import ingest

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = Window((32, 32, 32), (4, 4, 4))
SAMPLING = Sampling(window=WINDOW, radius=6.0)


@dataclass(frozen=True, eq=False)
class _Memory:
    array: npt.NDArray[np.float32]
    percentiles: tuple[float, float, float] = (-2.0, 0.5, 2.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.array.shape
        return (z, y, x)


def _example(shape: tuple[int, int, int] = (40, 60, 70), count: int = 3, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape, dtype=np.float32)
    return Example(_Memory(array), rng.uniform(0, shape, size=(count, 3)))


def test_crop_inside_is_the_normalised_volume_and_its_label() -> None:
    chosen = _example()
    voxels, label = read_crop(chosen, (5, 10, 20), SAMPLING)
    box = (slice(5, 37), slice(10, 42), slice(20, 52))
    expected = np.clip((chosen.volume.array[box] - 0.5) / 4.0, -3, 3)
    np.testing.assert_allclose(voxels, expected, rtol=1e-6)
    np.testing.assert_array_equal(label, paint_box(chosen.centres, box, radius=6.0))
    negated, same = read_crop(replace(chosen, negate=True), (5, 10, 20), SAMPLING)
    np.testing.assert_array_equal(negated, -voxels)
    np.testing.assert_array_equal(same, label)


@pytest.mark.parametrize("shape", [(40, 60, 70), (12, 33, 50)])
def test_crop_beyond_the_faces_is_reflected_with_its_label(shape: tuple[int, int, int]) -> None:
    chosen = _example(shape)
    whole = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    padding = [(40, 40)] * 3
    start = (-4, 30, 45)
    box = tuple(slice(40 + a, 72 + a) for a in start)
    voxels, label = read_crop(chosen, start, SAMPLING)
    expected = np.pad((chosen.volume.array - 0.5) / 4.0, padding, mode="reflect")[box]
    np.testing.assert_allclose(voxels, np.clip(expected, -3, 3), rtol=1e-6)
    painted = np.pad(paint_box(chosen.centres, whole, radius=6.0), padding, mode="reflect")[box]
    np.testing.assert_array_equal(label, painted)


def test_a_step_is_the_same_each_time_and_unlike_the_next() -> None:
    examples = [_example(seed=1), _example(seed=2)]
    noisy = replace(SAMPLING, augmentation=Augmentation(turns=True, noise=0.5, scale=0.2, blur=1, sharpen=1))
    first = draw_batch(examples, noisy, size=3, seed=7, step=11)
    again = draw_batch(examples, noisy, size=3, seed=7, step=11)
    other = draw_batch(examples, noisy, size=3, seed=7, step=12)
    assert first[0].shape == first[1].shape == (3, 32, 32, 32)
    assert first[0].dtype == first[1].dtype == np.float32
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (0.0, False)])
def test_crops_hold_a_particle_when_asked_for(share: float, holds: bool) -> None:
    examples = [_example((80, 90, 100), count=2)]
    sampling = replace(SAMPLING, positive=share)
    for step in range(30):
        _, label, _ = draw_batch(examples, sampling, size=1, seed=0, step=step)
        assert (label.max() > 0) == holds


def test_positive_crops_hold_their_particle_anywhere() -> None:
    chosen = Example(_Memory(np.zeros((90, 90, 90), np.float32)), np.array([[45.0, 45.0, 45.0]]))
    sampling = replace(SAMPLING, positive=1.0)
    tops = []
    for step in range(60):
        _, label, _ = draw_batch([chosen], sampling, size=1, seed=3, step=step)
        assert label.max() == 1.0
        tops.append(np.argwhere(label[0] == 1.0)[0])
    spread = np.array(tops)
    assert (spread.min(axis=0) < 4).all()
    assert (spread.max(axis=0) > 27).all()


def test_a_volume_without_particles_gives_empty_crops() -> None:
    empty = Example(_example().volume, np.zeros((0, 3)))
    _, label, _ = draw_batch([empty], SAMPLING, size=2, seed=0, step=0)
    assert not label.any()
    with pytest.raises(SourceError, match="1 training tomograms without a particle"):
        check_examples([empty], "training")
    check_examples([empty, _example()], "training")


def test_turns_keep_voxels_with_their_label_and_the_beam_axis() -> None:
    voxels = np.linspace(-1, 1, 32 * 32 * 32, dtype=np.float32).reshape(32, 32, 32)
    label = ((voxels + 1) / 2).astype(np.float32)
    seen = set()
    for seed in range(64):
        turned, painted = augment(voxels, label, Augmentation(turns=True), np.random.default_rng(seed))
        np.testing.assert_allclose((turned + 1) / 2, painted, atol=1e-6)
        # A plane across the beam stays a plane across the beam.
        assert {tuple(np.unique(plane).round(6)) for plane in painted} == {
            tuple(np.unique(plane).round(6)) for plane in label
        }
        seen.add((*turned[0, 0, :2], turned[0, 1, 0]))
    assert len(seen) == 16


def test_intensity_changes_leave_the_label_and_stay_within_bounds() -> None:
    voxels, label = read_crop(_example(), (0, 0, 0), SAMPLING)
    strong = Augmentation(scale=1.0, shift=1.0, noise=2.0, blur=2.0, sharpen=2.0)
    changed = [augment(voxels, label, strong, np.random.default_rng(seed)) for seed in range(8)]
    for disturbed, painted in changed:
        np.testing.assert_array_equal(painted, label)
        assert np.abs(disturbed).max() <= 3
        assert not np.array_equal(disturbed, voxels)
    same, _ = augment(voxels, label, Augmentation(), np.random.default_rng(0))
    np.testing.assert_array_equal(same, voxels)


def test_example_of_a_volume_has_its_centres_on_the_working_grid(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((24, 30, 36)).astype(np.float32)
    tomogram = open_tomogram(array, voxel_size=10.0)
    volume = ingest(tomogram, tmp_path / "volume.zarr", voxel_size=20.0)
    picks = Picks(np.array([[3.5, 10.5, 20.5]]), np.ones(1, np.float32))
    made = example(volume, picks)
    np.testing.assert_allclose(made.centres, [[1.5, 5.0, 10.0]])
    assert made.volume.shape == (12, 15, 18)


def test_crops_longer_than_wide_keep_their_shape_when_turned() -> None:
    voxels = np.linspace(0, 1, 4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    for seed in range(8):
        turned, label = augment(voxels, voxels, Augmentation(turns=True), np.random.default_rng(seed))
        assert turned.shape == voxels.shape
        np.testing.assert_array_equal(turned, label)
