"""Constant fill at the faces: what is fill, what is not, and that the cut does not matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tomocpt_stream import fill as fill_module
from tomocpt_stream.fill import Fill, face_values, find_fill, has_constant_cube, solid
from tomocpt_stream.tiles import whole

if TYPE_CHECKING:
    from tomocpt_stream.frame import Box

Floats = npt.NDArray[np.float32]


def noise(shape: tuple[int, int, int], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0.0, 10.0, shape).astype(np.float32)


def search(voxels: Floats, **kwargs: Any) -> Fill | None:
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])

    def create() -> zarr.Array[Any]:
        return zarr.create_array(
            zarr.storage.MemoryStore(), shape=shape, chunks=(128, 128, 128), dtype="bool"
        )

    return find_fill(lambda box: voxels[box], shape, create, **kwargs)


def mask_of(found: Fill | None, voxels: Floats) -> npt.NDArray[np.bool_]:
    assert found is not None
    return found.read(whole((voxels.shape[0], voxels.shape[1], voxels.shape[2])))


def octagon(shape: tuple[int, int, int], corner: int) -> npt.NDArray[np.bool_]:
    """The four corners of every plane, outside an octagon."""
    y, x = np.indices(shape[1:])
    y, x = np.minimum(y, shape[1] - 1 - y), np.minimum(x, shape[2] - 1 - x)
    return np.broadcast_to(y + x < corner, shape)


def test_masked_corners_are_fill() -> None:
    voxels = noise((20, 150, 140))
    corners = octagon((20, 150, 140), 30)
    voxels[corners] = 2.5
    found = search(voxels)
    assert found is not None
    assert found.values == (2.5,)
    assert found.voxels == (int(corners.sum()),)
    np.testing.assert_array_equal(mask_of(found, voxels), corners)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("thick", [1, 3])
def test_a_padded_slab_is_fill(axis: int, far: bool, thick: int) -> None:
    voxels = noise((40, 50, 45))
    slab = np.zeros(voxels.shape, bool)
    np.moveaxis(slab, axis, 0)[-thick:] = True
    if not far:
        slab = np.flip(slab, axis)
    voxels[slab] = 0.0
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), slab)


def test_a_constant_blob_inside_is_not_fill() -> None:
    voxels = noise((40, 50, 45))
    voxels[5:30, 10:30, 10:30] = 0.0
    assert search(voxels) is None
    voxels[:2] = 0.0  # a slab of the same value does not make it fill either
    slab = np.zeros(voxels.shape, bool)
    slab[:2] = True
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), slab)


def test_one_percent_is_not_more_than_one_percent() -> None:
    voxels = noise((100, 20, 20))
    voxels[:1] = 7.0
    assert search(voxels) is None
    voxels[1, :4, :4] = 7.0
    found = search(voxels)
    assert found is not None
    assert found.voxels == (416,)


@pytest.mark.parametrize("levels", [2, 3, 8])
def test_noise_of_few_levels_is_not_fill(levels: int) -> None:
    voxels = np.random.default_rng(levels).integers(0, levels, (40, 90, 90)).astype(np.float32)
    voxels[0, :4, :4] = 1.0  # so that there is a value to look for
    assert 1.0 in face_values(lambda box: voxels[box], (40, 90, 90))
    assert search(voxels) is None


def test_the_grain_of_a_tomogram_of_low_contrast_is_not_fill() -> None:
    grain = ndimage.gaussian_filter(np.random.default_rng(0).normal(0.0, 1.0, (60, 120, 120)), 1.0)
    voxels = np.rint(153 + 2.2 * grain / grain.std()).astype(np.float32)
    assert np.mean(voxels == 153) > 0.15
    voxels[0, :4, :4] = 153.0
    assert face_values(lambda box: voxels[box], (60, 120, 120)) == [153.0]
    assert has_constant_cube(voxels)
    assert search(voxels) is None


def test_noise_of_bytes_is_not_fill() -> None:
    voxels = np.rint(noise((30, 140, 140)) * 1.3)
    assert np.mean(voxels == 0) > 0.02  # every value near the middle is held by more than 1 %
    assert search(voxels) is None


def test_fill_amid_noise_of_its_own_value() -> None:
    voxels = np.rint(noise((30, 140, 140)) * 1.3)
    corners = octagon((30, 140, 140), 35)
    voxels[corners] = 0.0
    found = mask_of(search(voxels), voxels)
    assert found[corners].all()
    assert np.mean(found != corners) < 1e-3  # grains of the same value that grow on the region


def test_two_values_are_two_fills() -> None:
    voxels = noise((30, 60, 60))
    voxels[:3] = -1.0
    voxels[-4:] = 1.0
    found = search(voxels)
    assert found is not None
    assert dict(zip(found.values, found.voxels, strict=True)) == {-1.0: 3 * 3600, 1.0: 4 * 3600}
    marked = mask_of(found, voxels)
    assert marked[:3].all()
    assert marked[-4:].all()
    assert not marked[3:-4].any()


def test_zeros_of_either_sign_are_one_value() -> None:
    voxels = noise((30, 40, 40))
    voxels[:2, :20] = 0.0
    voxels[:2, 20:] = -0.0
    found = search(voxels)
    assert found is not None
    assert found.values == (0.0,)
    assert found.voxels == (2 * 1600,)


def test_a_region_winds_through_many_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snake that touches a face at its tail alone is one region, in boxes of any size."""
    voxels = noise((12, 60, 40))
    snake = np.zeros(voxels.shape, bool)
    for row in range(2, 50, 8):
        snake[4:8, row : row + 4, 2:38] = True
        if row < 42:
            bend = slice(34, 38) if row % 16 == 2 else slice(2, 6)
            snake[4:8, row : row + 12, bend] = True
    snake[4:8, 2:6, 0:4] = True  # the tail, at the face x = 0
    voxels[snake] = 5.0
    assert ndimage.label(snake)[1] == 1
    for box in (7, 8, 128):
        monkeypatch.setattr(fill_module, "BOX", box)
        monkeypatch.setattr(fill_module, "_TILE", (box, 2 * box, 2 * box))
        np.testing.assert_array_equal(mask_of(search(voxels), voxels), snake)
    voxels[4:8, 2:6, 0:2] = noise((4, 4, 2))  # without its tail it touches no face
    assert search(voxels) is None


def brute_force(voxels: Floats) -> npt.NDArray[np.bool_]:
    """Fill of all face values by one labelling of the whole volume."""
    found = np.zeros(voxels.shape, bool)
    for value in face_values(lambda box: voxels[box], voxels.shape):
        padded = np.pad(voxels == value, 4, mode="edge")
        cubes = ndimage.binary_opening(padded, np.ones((4, 4, 4)))[4:-4, 4:-4, 4:-4]
        labels, _ = ndimage.label(cubes)
        faces = [np.take(labels, at, axis=axis) for axis in range(3) for at in (0, -1)]
        kept = np.isin(labels, np.setdiff1d(np.concatenate([face.ravel() for face in faces]), [0]))
        if kept.sum() > 0.01 * voxels.size:
            found |= kept
    return found


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 24)] * 3),
    levels=st.integers(2, 4),
    box=st.integers(2, 9),
    smooth=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_any_box_size_gives_what_the_whole_volume_gives(
    shape: tuple[int, int, int], levels: int, box: int, smooth: int, seed: int
) -> None:
    values = np.random.default_rng(seed).random(shape)
    values = ndimage.uniform_filter(values, smooth)  # patches of one value: regions, many and winding
    values = (values - values.min()) / max(float(np.ptp(values)), 1e-9)
    voxels = np.floor(values * levels).astype(np.float32)
    wanted = brute_force(voxels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill_module, "BOX", box)
        patch.setattr(fill_module, "_TILE", (box, 2 * box, 3 * box))
        found = search(voxels)
    if found is None:
        assert not wanted.any()
    else:
        np.testing.assert_array_equal(mask_of(found, voxels), wanted)
        assert sum(found.voxels) == wanted.sum()


def test_solid_voxels_lie_in_a_cube() -> None:
    equal = np.zeros((11, 11, 11), bool)
    equal[3:7, 3:7, 3:7] = True
    equal[7, 5, 5] = True
    wanted = np.zeros((5, 5, 5), bool)
    wanted[:4, :4, :4] = True
    np.testing.assert_array_equal(solid(equal), wanted)
    assert has_constant_cube(np.where(equal, 1.0, noise((11, 11, 11))).astype(np.float32))
    assert not has_constant_cube(noise((11, 11, 11)))


def test_faces_are_read_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "_STRIP", 100)
    voxels = noise((9, 30, 40))
    voxels[0, 9:13, 20:24] = 3.0
    voxels[5:9, 29, 36:40] = 4.0
    voxels[4:8, 1:5, 39] = 4.0
    largest = 0

    def read(box: Box) -> Floats:
        nonlocal largest
        largest = max(largest, voxels[box].size)
        return voxels[box]

    assert face_values(read, (9, 30, 40)) == [4.0, 3.0]
    assert largest <= 40 * 5


def test_float_noise_is_not_read_beyond_its_faces() -> None:
    voxels = noise((40, 50, 60))
    read = 0

    def count(box: Box) -> Floats:
        nonlocal read
        read += voxels[box].size
        return voxels[box]

    assert find_fill(count, (40, 50, 60), lambda: pytest.fail("no mask is made")) is None
    assert read <= 2 * (50 * 60 + 40 * 60 + 40 * 50) + 600


def test_progress_counts_every_voxel() -> None:
    voxels = noise((30, 40, 50))
    voxels[:2] = 1.0
    reports: list[tuple[str, int, int]] = []
    search(voxels, progress=lambda *report: reports.append(report))
    assert reports[-1] == ("fill", 60000, 60000)
