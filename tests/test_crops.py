from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from tests.volumes import MemoryVolume
from tomocpt_stream.augmentation import Augmentation, Changes
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import (
    Example,
    Sampling,
    changed_crop,
    check_examples,
    draw_batch,
    example,
    known_at,
    known_voxels,
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


def _example(shape: tuple[int, int, int] = (40, 60, 70), count: int = 3, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape, dtype=np.float32)
    return Example(MemoryVolume(array), rng.uniform(0, shape, size=(count, 3)))


def test_crop_inside_is_the_normalised_volume_and_its_label() -> None:
    chosen = _example()
    voxels, label = read_crop(chosen, (5, 10, 20), SAMPLING)
    box = (slice(5, 37), slice(10, 42), slice(20, 52))
    expected = np.clip((chosen.volume.array[box] - 0.5) / 4.0, -3, 3)
    np.testing.assert_allclose(voxels, expected, rtol=1e-6)
    np.testing.assert_array_equal(label, paint_box(chosen.centres, box, radius=6.0))
    _, wide = read_crop(chosen, (5, 10, 20), replace(SAMPLING, widths=(0.99, 0.495)))
    np.testing.assert_array_equal(wide, paint_box(chosen.centres, box, radius=6.0, widths=(0.99, 0.495)))
    assert (wide >= label).all()
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
    chosen = Example(MemoryVolume(np.zeros((90, 90, 90), np.float32)), np.array([[45.0, 45.0, 45.0]]))
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


def test_example_of_a_volume_has_its_centres_on_the_working_grid(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((24, 30, 36)).astype(np.float32)
    tomogram = open_tomogram(array, voxel_size=10.0)
    volume = ingest(tomogram, tmp_path / "volume.zarr", voxel_size=20.0)
    picks = Picks(np.array([[3.5, 10.5, 20.5]]), np.ones(1, np.float32))
    made = example(volume, picks)
    np.testing.assert_allclose(made.centres, [[1.5, 5.0, 10.0]])
    assert made.volume.shape == (12, 15, 18)


@dataclass(frozen=True, eq=False)
class _Slab:
    """A region of the planes from `low` on, which counts the voxels that it was asked for."""

    low: int
    asked: list[int]

    def inside(self, spans: tuple[tuple[int, int], ...]) -> npt.NDArray[np.bool_]:
        marks = np.zeros([b - a for a, b in spans], bool)
        marks[max(0, self.low - spans[0][0]) :] = True
        self.asked.append(marks.size)
        return marks


POSES = Augmentation(tilt=15, zoom=0.1)
# Half of all crops stay as they lie; these do not.
POSED = [seed for seed in range(24) if Changes(POSES, np.random.default_rng(seed)).pose is not None]


def test_a_turned_crop_has_its_label_where_its_particles_are() -> None:
    """The volume is the label itself, so that turned voxels and painted label must agree."""
    shape, moved = (70, 80, 90), []
    whole = (slice(0, 70), slice(0, 80), slice(0, 90))
    for seed in POSED[:6]:
        rng = np.random.default_rng(seed)
        centres = rng.uniform(0, shape, size=(40, 3))
        chosen = Example(MemoryVolume(paint_box(centres, whole, radius=9.0), (-0.5, 0.0, 0.5)), centres)
        sampling = replace(SAMPLING, radius=9.0, augmentation=POSES)
        start = [int(a) for a in rng.integers(-4, np.array(shape) - 24)]
        voxels, label, marks = changed_crop(chosen, start, sampling, np.random.default_rng(seed))
        known = np.ones(label.shape, bool) if marks is None else marks
        assert label[known].max() > 0.2
        assert np.abs(voxels - label)[known].max() < 0.09
        moved.append(np.abs(read_crop(chosen, start, sampling)[1] - label)[known].max())
    assert max(moved) > 0.3


def test_what_lies_beyond_a_face_is_not_known_of_a_turned_crop() -> None:
    chosen = _example((60, 60, 60))
    turned = replace(SAMPLING, augmentation=POSES)
    for seed in POSED[:4]:
        known = changed_crop(chosen, (-8, 14, 14), turned, np.random.default_rng(seed)).known
        assert known is not None
        assert not known[:4].any()
        assert known[16:].all()
        assert changed_crop(chosen, (14, 14, 14), turned, np.random.default_rng(seed)).known is None


def test_voxels_that_were_not_annotated_are_unknown_and_read_crop_by_crop() -> None:
    region = _Slab(20, [])
    chosen = replace(_example((40, 60, 70)), annotated=region)
    crop = changed_crop(chosen, (5, 10, 20), SAMPLING, np.random.default_rng(0))
    assert crop.known is not None
    assert (crop.known == (np.arange(5, 37) >= 20)[:, None, None]).all()
    plain = changed_crop(replace(chosen, annotated=None), (5, 10, 20), SAMPLING, np.random.default_rng(0))
    np.testing.assert_array_equal(crop.label, plain.label)
    assert plain.known is None
    # Beyond a face the region is reflected with the voxels.
    first = changed_crop(chosen, (-4, 0, 0), SAMPLING, np.random.default_rng(0)).known
    last = changed_crop(chosen, (12, 0, 0), SAMPLING, np.random.default_rng(0)).known
    assert first is not None
    assert last is not None
    assert first[:, 5, 5].tolist() == [abs(z) >= 20 for z in range(-4, 28)]
    assert last[-4:].all()
    assert max(region.asked) <= 32**3


def test_a_turned_region_goes_with_its_crop() -> None:
    chosen = replace(_example((70, 70, 70)), annotated=_Slab(36, []))
    turned = replace(SAMPLING, augmentation=Augmentation(tilt=15))
    angles = set()
    for seed in POSED[:8]:
        known = changed_crop(chosen, (20, 20, 20), turned, np.random.default_rng(seed)).known
        assert known is not None
        # The face of the slab goes through the middle of the crop, whichever way it is turned.
        assert known.mean() == pytest.approx(0.5, abs=0.02)
        assert known[-4:].all()
        assert not known[:4].any()
        angles.add(int(known[:, 0, 0].sum()))
    assert len(angles) > 2


def test_nothing_is_known_around_a_doubtful_place_that_no_particle_explains() -> None:
    volume = MemoryVolume(np.zeros((60, 60, 60), np.float32))
    centres, doubtful = np.array([[30.0, 30.0, 30.0]]), np.array([[30.0, 30.0, 42.0], [8.0, 8.0, 8.0]])
    chosen = Example(volume, centres, doubtful=doubtful)
    box = (slice(0, 60), slice(0, 60), slice(0, 60))
    known = known_voxels(chosen, box, 6.0)
    assert known is not None
    grid = np.stack(np.meshgrid(*[np.arange(60.0)] * 3, indexing="ij"), axis=-1)
    away = [np.linalg.norm(grid - place, axis=-1) for place in (*doubtful, *centres)]
    expected = (away[0] > 9) & (away[1] > 9) | (away[2] <= np.minimum(away[0], away[1]))
    np.testing.assert_array_equal(known, expected)
    part = known_voxels(chosen, (slice(20, 40), slice(5, 40), slice(30, 50)), 6.0)
    np.testing.assert_array_equal(part, known[20:40, 5:40, 30:50])
    # A particle of another kind explains a candidate as well.
    other = replace(chosen, others=doubtful)
    assert np.asarray(known_voxels(other, box, 6.0)).all()
    # In a turned crop the places turn with the particles.
    turned = replace(SAMPLING, augmentation=Augmentation(tilt=15))
    crop = changed_crop(chosen, (16, 16, 24), turned, np.random.default_rng(POSED[0]))
    assert crop.known is not None
    assert 0 < (~crop.known).sum() < 3054
    assert crop.known[crop.label > 0.5].all()


def test_places_are_known_where_they_were_annotated() -> None:
    chosen = replace(_example((40, 60, 70)), annotated=_Slab(20, []))
    places = np.array([[19.4, 0, 0], [19.6, 0, 0], [45.0, -3, 80], [-2.0, 5, 5]])
    assert known_at(chosen, places).tolist() == [False, True, True, False]
    assert known_at(replace(chosen, annotated=None), places).all()
    assert known_at(chosen, np.zeros((0, 3)), 6.0).shape == (0,)
    doubted = replace(
        chosen, centres=np.array([[30.0, 30, 30]]), doubtful=np.array([[30.0, 30, 42], [5, 5, 5]])
    )
    places = np.array([[30.0, 30, 35], [30, 30, 37], [30, 30, 50], [30, 30, 52], [6, 6, 6]])
    assert known_at(doubted, places, 6.0).tolist() == [True, False, False, True, False]
    assert known_at(doubted, places).tolist() == [True, True, True, True, False]
    alone = replace(doubted, centres=np.zeros((0, 3)), annotated=None)
    assert known_at(alone, places, 6.0).tolist() == [False, False, False, True, False]


def test_places_are_looked_up_box_by_box() -> None:
    rng = np.random.default_rng(6)
    region, places = _Slab(70, []), rng.uniform(-5, 133, (400, 3))
    chosen = replace(_example((128, 128, 64)), annotated=region)
    known = known_at(chosen, places)
    assert known.tolist() == (np.rint(places[:, 0]) >= 70).tolist()
    assert len(region.asked) == 4
    assert max(region.asked) <= 64**3


def test_an_empty_crop_is_empty_behind_the_face_too() -> None:
    """What hangs over a face is the volume reflected, with the particles that lie there."""
    chosen = Example(MemoryVolume(np.zeros((34, 34, 120), np.float32)), np.array([[17.0, 17, 102]]))
    for step in range(40):
        _, label, _ = draw_batch([chosen], replace(SAMPLING, positive=0.0), size=1, seed=0, step=step)
        assert not label.any()


def test_drawn_crops_lie_where_the_truth_is_known() -> None:
    centres = np.array([[10.0, 40, 40], [60, 4, 4]])
    chosen = Example(MemoryVolume(np.zeros((80, 80, 80), np.float32)), centres, annotated=_Slab(50, []))
    assert chosen.certain.tolist() == [[60, 4, 4]]
    for step in range(20):
        for share in (0.0, 1.0):
            batch = draw_batch([chosen], replace(SAMPLING, positive=share), size=1, seed=0, step=step)
            assert batch.known is not None
            assert batch.known.mean() >= 1 / 8 or share
            assert bool((batch.label[batch.known] > 0).any()) == bool(share)
    nowhere = replace(chosen, annotated=_Slab(79, []))
    with pytest.raises(SourceError, match=r"no crop with 12\.5% of known voxels"):
        draw_batch([nowhere], SAMPLING, size=1, seed=0, step=0)
    with pytest.raises(SourceError, match="without a particle"):
        check_examples([nowhere], "training")


def test_empty_crops_are_drawn_around_other_kinds_and_examples_by_weight() -> None:
    volume = MemoryVolume(np.zeros((120, 120, 120), np.float32))
    others = np.array([[100.0, 100, 100]])
    light = Example(volume, np.array([[10.0, 10, 10]]), others=others, weight=0.5)
    heavy = replace(light, volume=MemoryVolume(np.ones((120, 120, 120), np.float32)), weight=1.5)
    batch = draw_batch([light, heavy], replace(SAMPLING, positive=0.0, hard=1.0), size=200, seed=0, step=0)
    assert not batch.label.any()
    share = (batch.voxels[:, 0, 0, 0] > 0).mean()
    assert share == pytest.approx(0.75, abs=0.1)
    marked = replace(light, centres=others, others=others)
    again = draw_batch([marked], replace(SAMPLING, positive=0.0, hard=1.0), size=1, seed=0, step=0)
    assert again.label.any()  # a place that is nothing but crowded is taken as it is
    seen = draw_batch([replace(light, centres=np.zeros((0, 3)))], SAMPLING, size=20, seed=1, step=0)
    assert not seen.label.any()
