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
from tomocpt_stream.fill import Fill, Regions, face_values, find_fill, solid
from tomocpt_stream.tiles import whole

if TYPE_CHECKING:
    from tomocpt_stream.frame import Box

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


def noise(shape: tuple[int, int, int], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0.0, 10.0, shape).astype(np.float32)


def search(voxels: Floats, **kwargs: Any) -> Fill | None:
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])

    def create() -> zarr.Array[Any]:
        return zarr.create_array(
            zarr.storage.MemoryStore(), shape=shape, chunks=(128, 128, 128), dtype="bool"
        )

    return find_fill(lambda box: voxels[box], shape, create, **kwargs)


def mask_of(found: Fill | None, voxels: Floats) -> Bools:
    assert found is not None
    return found.read(whole((voxels.shape[0], voxels.shape[1], voxels.shape[2])))


def octagon(shape: tuple[int, int, int], corner: int) -> Bools:
    """The four corners of every plane, outside an octagon."""
    y, x = np.indices(shape[1:])
    y, x = np.minimum(y, shape[1] - 1 - y), np.minimum(x, shape[2] - 1 - x)
    return np.broadcast_to(y + x < corner, shape)


def outside_circle(shape: tuple[int, int, int], radius: float) -> Bools:
    """What a circular mask of every plane leaves out."""
    y, x = np.indices(shape[1:])
    y, x = y - (shape[1] - 1) / 2, x - (shape[2] - 1) / 2
    return np.broadcast_to(y**2 + x**2 > radius**2, shape)


def slab_of(shape: tuple[int, int, int], axis: int, thick: int, *, far: bool) -> Bools:
    """The first planes along an axis, or the last."""
    slab = np.zeros(shape, bool)
    np.moveaxis(slab, axis, 0)[-thick:] = True
    return slab if far else np.flip(slab, axis)


def small_boxes(patch: pytest.MonkeyPatch, box: int, pending: int = 0) -> None:
    patch.setattr(fill_module, "BOX", box)
    patch.setattr(fill_module, "_TILE", (box, 2 * box, 3 * box))
    patch.setattr(fill_module, "_PENDING", pending)


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
@pytest.mark.parametrize("thick", [2, 3, 5])
def test_a_padded_slab_is_fill(axis: int, far: bool, thick: int) -> None:
    voxels = noise((40, 50, 45))
    slab = slab_of((40, 50, 45), axis, thick, far=far)
    voxels[slab] = 0.0
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), slab)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("far", [False, True])
def test_one_blank_plane_is_not_fill(axis: int, far: bool) -> None:
    voxels = noise((40, 50, 45))
    voxels[slab_of((40, 50, 45), axis, 1, far=far)] = 0.0
    assert face_values(lambda box: voxels[box], (40, 50, 45)) == [0.0]
    assert search(voxels) is None


@pytest.mark.parametrize("shape", [(10, 12, 14), (30, 20, 3), (2, 9, 9), (1, 9, 9)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ramp_has_no_fill(shape: tuple[int, int, int], axis: int) -> None:
    assert search(np.indices(shape)[axis].astype(np.float32) if shape[axis] > 1 else noise(shape)) is None


def test_a_single_section_has_no_fill() -> None:
    voxels = noise((1, 40, 40))
    voxels[:, :20] = 0.0
    assert face_values(lambda box: voxels[box], (1, 40, 40)) == [0.0]
    assert search(voxels) is None


@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(*[st.integers(1, 8)] * 3), seed=st.integers(0, 999))
def test_a_few_voxels_of_float_noise_have_no_fill(shape: tuple[int, int, int], seed: int) -> None:
    assert search(noise(shape, seed)) is None


@pytest.mark.parametrize("radius", [45.0, 49.0, 49.3, 49.5, 49.6, 50.0, 51.0, 60.0])
def test_all_that_a_circular_mask_leaves_out_is_fill(radius: float) -> None:
    """Also the slivers beside the point where the circle meets a face."""
    voxels = noise((12, 100, 100))
    outside = outside_circle((12, 100, 100), radius)
    voxels[outside] = 0.0
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), outside)


def test_all_that_an_oblique_mask_leaves_out_is_fill() -> None:
    z, y, x = np.indices((40, 90, 80))
    outside = (20 * x < y) | (z + 30 * y > 2650)
    voxels = noise((40, 90, 80))
    voxels[outside] = 0.0
    equal = np.pad(np.pad(outside, 2, mode="edge"), 1)
    assert np.count_nonzero(solid(equal)) < outside.sum() - 100  # its thin ends lie in no cube
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), outside)


def test_fill_goes_on_thinly_through_boxes_without_any_cube(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block in the last box, that a thread in the boxes before it ties to a spot on a face."""
    voxels = noise((33, 33, 33))
    region = np.zeros(voxels.shape, bool)
    region[24:32, 24:32, 24:32] = True
    region[2, 2, 0:30] = region[2, 2:30, 29] = region[2:30, 29, 29] = True
    region[0:4, 0:4, 0] = True
    voxels[region] = 4.0
    for box in (5, 8, 11, 128):
        small_boxes(monkeypatch, box)
        np.testing.assert_array_equal(mask_of(search(voxels), voxels), region)
    voxels[2, 15, 29] = 5.0
    assert search(voxels) is None


def test_a_constant_blob_inside_is_not_fill() -> None:
    voxels = noise((40, 50, 45))
    voxels[5:30, 10:30, 10:30] = 0.0
    assert search(voxels) is None
    voxels[:2] = 0.0  # a slab of the same value does not make it fill either
    slab = np.zeros(voxels.shape, bool)
    slab[:2] = True
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), slab)


def test_one_percent_is_not_more_than_one_percent() -> None:
    voxels = noise((200, 20, 20))
    voxels[:2] = 7.0
    assert search(voxels) is None
    voxels[2, 5, 5] = 7.0
    found = search(voxels)
    assert found is not None
    assert found.voxels == (801,)


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
    labels, _ = ndimage.label(voxels == 0)
    np.testing.assert_array_equal(found, np.isin(labels, np.unique(labels[corners])))
    assert found[corners].all()
    assert 0 < np.mean(found != corners) < 2e-3  # grains of the same value that grow on the region


def test_fill_that_noise_has_grown_on_is_what_is_solid_of_it() -> None:
    """Of voxels that are zero at random, more than 31 % are joined over any distance."""
    voxels = np.random.default_rng(0).choice([0.0, 1.0, 2.0], (60, 60, 60), p=[0.4, 0.3, 0.3])
    voxels = voxels.astype(np.float32)
    slab = slab_of((60, 60, 60), 1, 6, far=True)
    voxels[slab] = 0.0
    assert np.bincount(ndimage.label(voxels == 0)[0][voxels == 0]).max() > 4 * slab.sum()
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), slab)


def test_noise_is_forgotten_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds the pieces of one layer of boxes, however long the volume."""
    voxels = np.random.default_rng(0).integers(0, 8, (128, 16, 16)).astype(np.float32)
    voxels[:2] = 1.0
    kept: list[int] = []
    settle = Regions.settle

    def count(regions: Regions, numbers: npt.NDArray[np.int64]) -> None:
        settle(regions, numbers)
        kept.append(len(regions._numbers))

    monkeypatch.setattr(Regions, "settle", count)
    small_boxes(monkeypatch, 8, pending=1 << 30)
    wanted = mask_of(search(voxels), voxels)
    assert len(kept) == 2
    kept.clear()
    monkeypatch.setattr(fill_module, "_PENDING", 20)
    np.testing.assert_array_equal(mask_of(search(voxels), voxels), wanted)
    assert len(kept) > 50
    assert 0 < max(kept) <= 4 * 16 * 16
    assert kept[-1] < 40


def test_boxes_without_fill_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = np.rint(noise((64, 16, 16)) * 1.3)
    voxels[:2] = 0.0
    monkeypatch.setattr(fill_module, "BOX", 16)
    monkeypatch.setattr(fill_module, "_TILE", (16, 16, 16))
    read: list[Box] = []

    def note(box: Box) -> Floats:
        read.append(box)
        part: Floats = voxels[box]
        return part

    mask = zarr.create_array(
        zarr.storage.MemoryStore(), shape=voxels.shape, chunks=(16, 16, 16), dtype="bool"
    )
    assert find_fill(note, (64, 16, 16), lambda: mask) is not None
    assert [box[0].start for box in read[6:]] == [0, 13, 29, 45, 0]


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
        small_boxes(monkeypatch, box)
        np.testing.assert_array_equal(mask_of(search(voxels), voxels), snake)
    voxels[4:8, 2:6, 0:2] = noise((4, 4, 2))  # without its tail it touches no face
    assert search(voxels) is None


def reference(voxels: Floats) -> Bools:
    """The definition, word for word, by labelling the whole volume."""
    found = np.zeros(voxels.shape, bool)
    if min(voxels.shape) < 2:
        return found
    for value in face_values(lambda box: voxels[box], voxels.shape):
        equal = voxels == value
        padded = np.pad(np.pad(equal, 2, mode="edge"), 4)
        cubes = ndimage.binary_opening(padded, np.ones((4, 4, 4)))[6:-6, 6:-6, 6:-6]
        regions = [region for region in at_faces(equal) if 2 * cubes[region].sum() >= region.sum()]
        whole_regions = np.any([np.zeros_like(equal), *regions], axis=0)
        solid_parts = np.any([np.zeros_like(equal), *at_faces(cubes)], axis=0)
        if max(whole_regions.sum(), solid_parts.sum()) > 0.01 * voxels.size:
            found |= whole_regions | solid_parts
    return found


def at_faces(voxels: Bools) -> list[Bools]:
    """The connected components that touch a face, each as a mask."""
    labels, _ = ndimage.label(voxels)
    faces = [np.take(labels, at, axis=axis).ravel() for axis in range(3) for at in (0, -1)]
    return [labels == label for label in np.setdiff1d(np.concatenate(faces), [0])]


def compare(voxels: Floats, box: int, pending: int) -> None:
    wanted = reference(voxels)
    with pytest.MonkeyPatch.context() as patch:
        small_boxes(patch, box, pending)
        found = search(voxels)
    if found is None:
        assert not wanted.any()
    else:
        np.testing.assert_array_equal(mask_of(found, voxels), wanted)
        assert sum(found.voxels) == wanted.sum()


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
    compare(np.floor(values * levels).astype(np.float32), box, pending=seed % 50)


@st.composite
def tomograms(draw: st.DrawFn) -> Floats:
    """Volumes whose voxels outside a mask, at a slab, or both, are zero or one."""
    shape = draw(st.tuples(*[st.integers(2, 26)] * 3))
    sd = draw(st.sampled_from([0.5, 1.2, 3.0, 13.0, None]))
    voxels = noise(shape, draw(st.integers(0, 999)))
    if sd is not None:
        voxels = np.rint(voxels * np.float32(sd / 10.0))  # zero is among the noise
    short = min(shape[1:])
    tangent = [(n - 1) / 2 for n in shape[1:]]
    masks = [
        octagon(shape, draw(st.integers(0, short))),
        outside_circle(shape, draw(st.sampled_from(tangent) | st.floats(0.3 * short, 0.8 * short))),
        slab_of(shape, draw(st.integers(0, 2)), draw(st.sampled_from([1, 2, 3, 5])), far=draw(st.booleans())),
        np.zeros(shape, bool),
    ]
    voxels[masks[draw(st.integers(0, 3))]] = 0.0
    voxels[masks[draw(st.integers(2, 3))]] = draw(st.sampled_from([0.0, -0.0, 1.0]))
    return voxels


@settings(deadline=None, max_examples=100)
@given(voxels=tomograms(), box=st.integers(2, 13), pending=st.integers(0, 60))
def test_any_mask_in_any_noise_is_found_as_in_the_whole_volume(
    voxels: Floats, box: int, pending: int
) -> None:
    compare(voxels, box, pending)


def test_solid_voxels_lie_in_a_cube() -> None:
    equal = np.zeros((11, 11, 11), bool)
    equal[3:7, 3:7, 3:7] = True
    equal[7, 5, 5] = True
    wanted = np.zeros((5, 5, 5), bool)
    wanted[:4, :4, :4] = True
    np.testing.assert_array_equal(solid(equal), wanted)


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
