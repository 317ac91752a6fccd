from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mrcfile
import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from tomocpt_stream.errors import SourceError
from tomocpt_stream.frame import Frame, working_grid
from tomocpt_stream.mask import Mask, inside, open_mask
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picks import Picks
from tomocpt_stream.tomogram import Tomogram, open_tomogram

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.tomogram import BeamAxis

SHAPE = (20, 30, 40)


def _tomogram(**options: Any) -> Tomogram:
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    return open_tomogram(array, voxel_size=10.0, **options)


def _write(path: Path, array: Any, voxel_size: float) -> Path:
    with mrcfile.new(path) as file:
        file.set_data(array.astype(np.int8))
        file.voxel_size = voxel_size
    return path


def _blob(shape: Any) -> Any:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(n // 4, n // 2) for n in shape)] = True
    return mask


WHOLE = ((0, 20), (0, 30), (0, 40))


def test_a_mask_on_the_tomograms_own_voxels_is_the_mask() -> None:
    tomogram = _tomogram()
    mask = open_mask(_blob(SHAPE), tomogram.frame, working_grid(SHAPE, 10.0, 10.0))
    np.testing.assert_array_equal(mask.inside(WHOLE), _blob(SHAPE))
    part = ((3, 9), (5, 20), (8, 31))
    np.testing.assert_array_equal(mask.inside(part), _blob(SHAPE)[3:9, 5:20, 8:31])
    np.testing.assert_array_equal(mask.spanned(part), _blob(SHAPE)[3:9, 5:20, 8:31])
    again: Mask = pickle.loads(pickle.dumps(mask))
    np.testing.assert_array_equal(again.inside(part), mask.inside(part))
    assert again.fingerprint == mask.fingerprint


@pytest.mark.parametrize("beam_axis", ["z", "y"])
def test_a_mask_in_memory_can_be_stored_for_other_processes(tmp_path: Path, beam_axis: BeamAxis) -> None:
    tomogram = _tomogram(beam_axis=beam_axis)
    mask = open_mask(_blob(SHAPE), tomogram.frame, working_grid(tomogram.shape, 10.0, 13.0))
    stored = mask.stored(LocalStore(tmp_path), "mask")
    there: Mask = pickle.loads(pickle.dumps(stored))
    whole: Any = tuple((0, n) for n in working_grid(tomogram.shape, 10.0, 13.0).shape)
    for other in (stored, there):
        np.testing.assert_array_equal(other.inside(whole), mask.inside(whole))
        np.testing.assert_array_equal(other.spanned(whole), mask.spanned(whole))
        assert other.fingerprint == mask.fingerprint
    assert len(pickle.dumps(stored)) < 4000


@pytest.mark.parametrize("voxel_size", [7.0, 13.0, 25.0])
def test_a_working_voxel_takes_the_mask_at_its_nearest_source_voxel(voxel_size: float) -> None:
    tomogram, grid = _tomogram(), working_grid(SHAPE, 10.0, voxel_size)
    inside = open_mask(_blob(SHAPE), tomogram.frame, grid).inside(
        tuple((0, n) for n in grid.shape)  # type: ignore[arg-type]
    )
    working = np.argwhere(np.ones(grid.shape))
    source = np.floor(grid.to_source(working) + 0.5).astype(int).clip(0, np.array(SHAPE) - 1)
    np.testing.assert_array_equal(inside.ravel(), _blob(SHAPE)[tuple(source.T)])


def test_a_thin_mask_between_working_voxels_keeps_its_windows() -> None:
    thin = np.zeros(SHAPE, dtype=bool)
    thin[:, :, 21] = True  # no working voxel of 4 source voxels lies nearest to it
    grid = working_grid(SHAPE, 10.0, 40.0)
    mask = open_mask(thin, _tomogram().frame, grid)
    whole: Any = tuple((0, n) for n in grid.shape)
    assert mask.spanned(whole).any()
    assert not mask.inside(whole).any()


def test_an_unturned_volume_has_its_mask_in_the_files_axes(tmp_path: Path) -> None:
    tomogram = _tomogram(beam_axis="y")
    grid = working_grid(tomogram.shape, 10.0, 10.0)
    turned = open_tomogram(_blob(SHAPE).astype(np.float32), voxel_size=10.0, beam_axis="y")
    whole = tuple(slice(0, n) for n in tomogram.shape)
    expected = turned.read(whole) != 0  # type: ignore[arg-type]
    for given in (_blob(SHAPE), _write(tmp_path / "m.mrc", _blob(SHAPE), 10.0)):
        inside = open_mask(given, tomogram.frame, grid).inside(tuple((0, n) for n in tomogram.shape))  # type: ignore[arg-type]
        np.testing.assert_array_equal(inside, expected)


@pytest.mark.parametrize("header", [0.0, 1.0, 10.0, 3.3])
def test_a_mask_of_the_files_shape_needs_no_voxel_size(tmp_path: Path, header: float) -> None:
    path = _write(tmp_path / "m.mrc", _blob(SHAPE), header)
    mask = open_mask(path, _tomogram().frame, working_grid(SHAPE, 10.0, 10.0))
    np.testing.assert_array_equal(mask.inside(WHOLE), _blob(SHAPE))


def test_other_extents_and_numbers_are_refused(tmp_path: Path) -> None:
    frame, grid = _tomogram().frame, working_grid(SHAPE, 10.0, 10.0)
    with pytest.raises(SourceError, match=r"spans 100 x 150 x 200 Å.*200 x 300 x 400 Å"):
        open_mask(_write(tmp_path / "m.mrc", _blob((10, 15, 20)), 10.0), frame, grid)
    with pytest.raises(SourceError, match="spans"):
        open_mask(np.ones((20, 30, 41)), frame, grid)
    broken = np.ones(SHAPE, dtype=np.float32)
    broken[3, 3, 3] = np.nan
    with pytest.raises(SourceError, match="not a number"):
        open_mask(broken, frame, grid).inside(WHOLE)


def test_masks_that_differ_have_other_fingerprints() -> None:
    frame, grid = _tomogram().frame, working_grid(SHAPE, 10.0, 10.0)
    other = _blob(SHAPE)
    other[0, 0, 0] = True
    first, again, second = (
        open_mask(m, frame, grid).fingerprint for m in (_blob(SHAPE), _blob(SHAPE), other)
    )
    assert first == again != second


def test_a_mask_over_a_coarser_level() -> None:
    frame = Frame((10, 15, 20), 20.0, SHAPE, 10.0, level_scale=(2.0, 2.0, 2.0), level_shift=(0.5, 0.5, 0.5))
    grid = working_grid((10, 15, 20), 20.0, 20.0)
    inside = open_mask(_blob(SHAPE), frame, grid).inside(((0, 10), (0, 15), (0, 20)))
    level_0 = np.floor(frame.to_file(np.argwhere(np.ones((10, 15, 20)))) + 0.5).astype(int)
    np.testing.assert_array_equal(inside.ravel(), _blob(SHAPE)[tuple(level_0.T)])
    odd = Frame((15, 45, 50), 20.0, (31, 90, 101), 10.0, level_scale=(2.0,) * 3, level_shift=(0.5,) * 3)
    open_mask(np.ones((31, 90, 101)), odd, working_grid((15, 45, 50), 20.0, 20.0))


def test_chunks_that_a_zarr_mask_does_not_store_are_outside(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "m.zarr", shape=SHAPE, chunks=(8, 8, 8), dtype="uint8")
    array[:] = _blob(SHAPE)
    for given in (array, tmp_path / "m.zarr"):
        mask = open_mask(given, _tomogram().frame, working_grid(SHAPE, 10.0, 10.0))
        np.testing.assert_array_equal(mask.inside(WHOLE), _blob(SHAPE))


def test_a_mask_opened_with_other_axes_is_refused() -> None:
    cube = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    mask = open_tomogram(cube, voxel_size=10.0)
    turned = open_tomogram(cube, voxel_size=10.0, beam_axis="y")
    with pytest.raises(SourceError, match="beam_axis='z'"):
        open_mask(mask, turned.frame, working_grid(turned.shape, 10.0, 10.0))


def test_reading_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).random((40, 60, 80)) > 0.9
    for voxel_size in (4.0, 10.0, 23.0):
        grid = working_grid(SHAPE, 10.0, voxel_size)
        whole: Any = tuple((0, n) for n in grid.shape)
        masks = []
        for piece in (10**9, 700):
            monkeypatch.setattr("tomocpt_stream.mask._PIECE", piece)
            mask = open_mask(noise, _tomogram().frame, grid)
            masks.append((mask.inside(whole), mask.spanned(whole)))
        np.testing.assert_array_equal(masks[0][0], masks[1][0])
        np.testing.assert_array_equal(masks[0][1], masks[1][1])


def test_picks_are_asked_one_by_one_by_the_nearest_voxel(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    volume = rng.random((5, 6, 7)) < 0.5
    path = tmp_path / "mask.mrc"
    write_mrc(path, volume.astype(np.float32), 20.0)
    zyx = rng.uniform(-0.4, (9.4, 11.4, 13.4), (300, 3))
    picks = Picks(zyx, np.ones(300, np.float32), voxel_size=10.0)
    z, y, x = np.floor(np.floor(zyx + 0.5) * 10 / 20 + 0.5).clip(0, (4, 5, 6)).astype(int).T
    expected = volume[z, y, x]
    for shape in (None, (10, 12, 14)):
        for size in (4_000_000, 200):  # read at once, or in pieces of one plane
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tomocpt_stream.mask._PIECE", size)
                np.testing.assert_array_equal(inside(replace(picks, shape=shape), path), expected)
    outside = replace(picks, zyx=np.tile([[-1.0, 3.0, 3.0], [3.0, 3.0, 14.0], [3.0, 3.0, 3.0]], (100, 1)))
    assert not inside(replace(outside, shape=(10, 12, 14)), np.ones((10, 12, 14)))[:2].any()
    assert len(inside(replace(picks.take(np.zeros(0, np.intp)), voxel_size=None), path)) == 0


def test_masks_that_do_not_fit_picks_are_refused(tmp_path: Path) -> None:
    picks = Picks(np.full((4, 3), 30.0), np.ones(4, np.float32), voxel_size=10.0, tomogram="a")
    with pytest.raises(SourceError, match="without a voxel size"):
        inside(replace(picks, voxel_size=None), np.ones((9, 9, 9)))
    path = tmp_path / "mask.mrc"
    write_mrc(path, np.ones((50, 50, 50), np.float32), 1.0)  # a header that nobody filled in
    with pytest.raises(SourceError, match="4 of 4 picks lie beyond the mask, which spans 5 x 5 x 5"):
        inside(picks, path)
    assert inside(replace(picks, shape=(50, 50, 50)), path).all()
