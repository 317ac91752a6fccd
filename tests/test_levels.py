"""Coarser levels of a tomogram: which one is read, and where its picks lie."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.blobs import NamedBlobPicker, blobs
from tests.buckets import portal_zarr
from tomocpt_stream.errors import PlanError
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.lazy import heatmap_lazy
from tomocpt_stream.pipeline import pick
from tomocpt_stream.scoremap import open_heatmap
from tomocpt_stream.tomogram import open_tomogram

if TYPE_CHECKING:
    from pathlib import Path

    from tests.buckets import S3, Way

SHAPE = (41, 64, 60)
CENTRES = np.array([[10.5, 14.5, 12.5], [26.5, 20.5, 40.5], [30.5, 48.5, 22.5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tomogram of 5 Å with three levels."""
    return portal_zarr(
        tmp_path_factory.mktemp("levels") / "a.zarr", blobs(SHAPE, CENTRES, width=4.0), 5.0, 32
    )


@pytest.mark.parametrize(
    ("limit", "level"), [(4.0, 0), (5.0, 0), (9.9, 0), (10.0, 1), (19.0, 1), (20.0, 2), (1000.0, 2)]
)
def test_the_coarsest_level_that_is_fine_enough(folder: Path, limit: float, level: int) -> None:
    found = open_tomogram(folder).coarsest(limit)
    assert (found.level, found.voxel_size) == (level, 5.0 * 2**level)
    assert found.shape == tuple(-(-n // 2**level) for n in SHAPE)
    assert found.frame.file_shape == SHAPE
    assert found.name == "a"


def test_a_level_that_was_asked_for_is_never_made_finer(folder: Path) -> None:
    assert open_tomogram(folder, level=1).coarsest(5.0).level == 1
    assert open_tomogram(folder, level=1).coarsest(20.0).level == 2


def test_the_next_level_is_opened_as_the_first_was(folder: Path) -> None:
    first = open_tomogram(folder, voxel_size=6.0, name="mine", beam_axis="y", missing="fill")
    found = pickle.loads(pickle.dumps(first)).coarsest(12.0)
    assert (found.level, found.voxel_size, found.name) == (1, 12.0, "mine")
    assert found.frame.beam_axis == "y"
    assert found.frame.file_voxel_size == 6.0


def test_a_tomogram_of_one_level_stays_what_it_is() -> None:
    tomogram = open_tomogram(np.zeros((4, 5, 6), np.float32), voxel_size=5.0)
    assert tomogram.coarsest(1000.0) is tomogram


def test_picks_of_a_coarser_level_are_in_voxels_of_level_0(folder: Path) -> None:
    # The picker wants voxels of 10 Å: level 1 has them already.
    options = PickOptions(80.0, level="coarsest", contrast="dark")
    found = pick(open_tomogram(folder), NamedBlobPicker(), options)
    assert found.voxel_size == 5.0
    assert found.shape == SHAPE
    nearest = np.abs(found.zyx[:, None] - CENTRES[None]).max(axis=2).min(axis=0)
    assert len(found) == len(CENTRES)
    assert nearest.max() < 0.5
    fine = pick(open_tomogram(folder), NamedBlobPicker(), PickOptions(80.0, contrast="dark"))
    order = np.argsort(fine.zyx[:, 0])
    np.testing.assert_allclose(found.zyx[np.argsort(found.zyx[:, 0])], fine.zyx[order], atol=0.5)


def test_the_lazy_map_is_of_the_same_level(folder: Path, tmp_path: Path) -> None:
    options = PickOptions(80.0, level="coarsest", contrast="dark")
    pick(open_tomogram(folder), NamedBlobPicker(), options, keep_heatmap=tmp_path / "map")
    lazy = heatmap_lazy(open_tomogram(folder), NamedBlobPicker(), options)
    np.testing.assert_array_equal(lazy.compute(), open_heatmap(tmp_path / "map").array[:])


def test_only_the_coarser_level_is_fetched(folder: Path, s3: S3, way: Way) -> None:
    s3.bucket.put_folder(folder, "levels.zarr")
    tomogram = open_tomogram(s3.address("levels.zarr"), storage_options=s3.options())
    pick(tomogram, NamedBlobPicker(), PickOptions(80.0, level="coarsest", contrast="dark"))
    assert {one.path.split("/")[3] for one in way.data()} == {"1"}
    assert way.bytes == sum(
        path.stat().st_size for path in (folder / "1").rglob("*") if path.name[0].isdigit() and path.is_file()
    )


def test_other_words_for_a_level_are_refused() -> None:
    with pytest.raises(PlanError, match="level 'finest'; expected one of given, coarsest"):
        PickOptions(80.0, level="finest", contrast="dark")  # type: ignore[arg-type]
