"""Records of the portal as sources: which voxel size is believed, and what is said where a file disagrees."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.buckets import portal_zarr
from tests.portal_samples import record
from tomocpt_stream.errors import SourceError
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.tomogram import open_tomogram

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (6, 8, 10)
VOXELS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def stored(folder: Path, voxel_size: float, **fields: Any) -> Any:
    """A record whose zarr is on the disk and states a voxel size; the portal says 10.012 Å."""
    path = portal_zarr(folder / "TS_1.zarr", VOXELS, voxel_size, 8)
    said = {"voxel_spacing": 10.012, "size": (10, 8, 6), "s3_zarr": f"file://{path}", **fields}
    return replace(record(), **said)


def test_a_record_opens_as_its_file(tmp_path: Path) -> None:
    found = stored(tmp_path, 10.0)  # 0.12 % off, as copies of the portal's data have it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tomogram = open_tomogram(found)
    assert (tomogram.name, tomogram.shape, tomogram.voxel_size) == (found.name, SHAPE, 10.012)
    np.testing.assert_array_equal(tomogram.read((slice(0, 6), slice(0, 8), slice(0, 10))), VOXELS)
    assert pickle.loads(pickle.dumps(tomogram)).coarsest(21.0).voxel_size == pytest.approx(20.024)
    assert open_tomogram(found, level=1).voxel_size == pytest.approx(20.024)
    assert open_tomogram(found, voxel_size=9.0, name="mine").voxel_size == 9.0


def test_a_header_that_disagrees_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"states voxel sizes of 13.48, .* the portal's 10.012 Å is used"):
        tomogram = open_tomogram(stored(tmp_path, 13.48))
    assert tomogram.voxel_size == 10.012


def test_a_size_that_disagrees_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has \(6, 8, 10\) voxels .* the portal says \(7, 8, 10\)"):
        open_tomogram(stored(tmp_path, 10.0, size=(10, 8, 7)))


def test_the_mrc_file_stands_in_for_a_zarr_that_is_not_there(tmp_path: Path) -> None:
    write_mrc(tmp_path / "TS_1.mrc", VOXELS, 10.0)
    found = stored(tmp_path, 10.0, s3_zarr=None, s3_mrc=f"file://{tmp_path / 'TS_1.mrc'}")
    assert open_tomogram(found).voxel_size == 10.012


def test_a_record_without_a_file_is_named(tmp_path: Path) -> None:
    found = stored(tmp_path, 10.0, s3_zarr=None, s3_mrc=None)
    with pytest.raises(SourceError, match=f"no file of tomogram {found.id}"):
        open_tomogram(found)
