from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tomocpt_stream.refine import MAX_SHIFT, REACH, offsets

Array = np.ndarray[Any, Any]
SHAPE = (33, 33, 33)


def _label(centre: Array, radius: float, shape: tuple[int, ...] = SHAPE) -> Array:
    """Paint equations 1 to 3 of the paper."""
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    square = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
    widths = (0.95 * radius / 3, 0.5 * radius / 3)
    label = sum(np.exp(-square / (2 * width**2)) for width in widths) / 2
    return np.where(square <= radius**2, label, 0.0).astype("float32")


def _first_maximum(label: Array) -> Array:
    return np.array([np.unravel_index(np.argmax(label), label.shape)])


def _error(label: Array, centre: Array) -> float:
    point = _first_maximum(label)
    return float(np.linalg.norm(point + offsets(label, point, (0, 0, 0), label.shape) - centre))


phases = st.tuples(*[st.floats(-0.5, 0.5)] * 3).map(lambda phase: np.array(phase) + 16)


@settings(max_examples=60, deadline=None)
@given(centre=phases, radius=st.floats(5, 14))
def test_a_label_is_found_to_a_tenth_of_a_voxel_at_any_phase(centre: Array, radius: float) -> None:
    assert _error(_label(centre, radius), centre) < 0.03


@settings(max_examples=60, deadline=None)
@given(centre=phases, radius=st.floats(5, 14), top=st.floats(0.85, 0.95))
def test_a_clipped_label_is_found_from_the_first_voxel_of_its_plateau(
    centre: Array, radius: float, top: float
) -> None:
    assert _error(np.minimum(_label(centre, radius), np.float32(top)), centre) < 0.05


@settings(max_examples=30, deadline=None)
@given(centre=phases, way=st.tuples(*[st.floats(-1, 1)] * 3), radius=st.floats(6, 10))
def test_a_neighbour_at_three_halves_of_a_radius_does_not_pull(
    centre: Array, way: tuple[float, float, float], radius: float
) -> None:
    direction = np.array([way[0] + 1e-3, *way[1:]])
    own, other = _label(centre, radius), _label(centre + 15 * direction / np.linalg.norm(direction), radius)
    point = _first_maximum(own)
    for both in (np.maximum(own, other), own + other):
        found = point + offsets(both, point, (0, 0, 0), SHAPE)
        assert np.linalg.norm(found - centre) < 0.05


@pytest.mark.parametrize(("noise", "worst", "usual"), [(0.02, 0.08, 0.04), (0.05, 0.2, 0.08)])
def test_noise_moves_the_centre_little(noise: float, worst: float, usual: float) -> None:
    rng = np.random.default_rng(3)
    errors = []
    for _ in range(60):
        centre = 16 + rng.uniform(-0.5, 0.5, 3)
        label = _label(centre, 10.0)
        errors.append(_error(label + rng.normal(scale=noise, size=SHAPE).astype("float32"), centre))
    assert max(errors) < worst
    assert np.median(errors) < usual


@settings(max_examples=40, deadline=None)
@given(depth=st.floats(0, 4), phase=st.floats(-0.5, 0.5), corner=st.booleans(), radius=st.floats(6, 12))
def test_near_faces_the_centre_stays_close_and_the_other_axes_exact(
    depth: float, phase: float, corner: bool, radius: float
) -> None:
    centre = np.array([depth, depth if corner else 16.0, 16 + phase])
    label = _label(centre, radius)
    point = _first_maximum(label)
    error = (point + offsets(label, point, (0, 0, 0), SHAPE) - centre)[0]
    assert np.abs(error[:2]).max() < 0.3
    assert abs(error[2]) < 0.03


@settings(max_examples=80, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 10**6), levels=st.integers(1, 9))
def test_refined_positions_stay_inside_and_near_on_any_map(
    shape: tuple[int, int, int], seed: int, levels: int
) -> None:
    array = np.random.default_rng(seed).integers(0, levels, shape).astype("float32")
    points = np.argwhere(array > -1)
    moved = offsets(array, points, (0, 0, 0), shape)
    assert moved.dtype == np.float32
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() <= MAX_SHIFT
    assert (points + moved >= 0).all()
    assert (points + moved <= np.array(shape) - 1).all()
    if levels == 1:
        assert not moved.any()


def test_axes_of_one_or_two_voxels_are_left_alone() -> None:
    array = _label(np.array([0, 0.4, 6.3]), 6.0, (1, 2, 14))
    assert offsets(array, np.array([[0, 0, 6]]), (0, 0, 0), (1, 2, 14))[0].tolist() == pytest.approx(
        [0, 0, 0.3], abs=0.02
    )


def test_only_the_reach_counts_and_the_batch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    array = rng.random((24, 24, 24)).astype("float32")
    points = rng.integers(0, 24, (300, 3))
    whole = offsets(array, points, (0, 0, 0), array.shape)
    monkeypatch.setattr("tomocpt_stream.refine._BATCH", 7)
    np.testing.assert_array_equal(offsets(array, points, (0, 0, 0), array.shape), whole)
    for point, expected in zip(points, whole, strict=True):
        low = np.maximum(point - REACH, 0)
        block = array[tuple(slice(a, b) for a, b in zip(low, point + REACH + 1, strict=True))]
        z, y, x = (int(i) for i in low)
        alone = offsets(np.asfortranarray(block), point[None], (z, y, x), (24, 24, 24))
        np.testing.assert_array_equal(alone[0], expected)


def test_scale_and_flips_do_not_matter() -> None:
    array = _label(np.array([16.2, 15.9, 16.4]), 8.0)
    point = np.array([[16, 16, 16]])
    expected = offsets(array, point, (0, 0, 0), SHAPE)
    for factor in (1e-30, 255.0, 1e30):
        scaled = offsets(array.astype("float64") * factor - factor, point, (0, 0, 0), SHAPE)
        np.testing.assert_allclose(scaled, expected, atol=1e-5)
    flipped = offsets(array[::-1, ::-1, ::-1], point, (0, 0, 0), SHAPE)
    np.testing.assert_allclose(flipped, -expected, atol=1e-6)


def test_integer_maps_are_refined() -> None:
    centre = np.array([16.3, 16.0, 15.8])
    eight_bit = np.round(255 * _label(centre, 10.0)).astype("uint8")
    assert _error(eight_bit, centre) < 0.05


@pytest.mark.parametrize("peak", [np.inf, 1e308])
def test_infinite_and_huge_voxels_leave_finite_offsets(peak: float) -> None:
    array = np.zeros(SHAPE)
    array[16, 16, 16] = peak
    array[16, 16, 17] = -peak
    assert np.isfinite(offsets(array, np.array([[16, 16, 16]]), (0, 0, 0), SHAPE)).all()


def test_no_points_have_no_offsets() -> None:
    assert offsets(np.zeros(SHAPE), np.zeros((0, 3), dtype=np.int64), (0, 0, 0), SHAPE).shape == (0, 3)
