from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tomocpt_stream.errors import FormatError
from tomocpt_stream.picks import Picks
from tomocpt_stream.targets import LABELS, Label, paint_box, paint_targets, squared_distances


def _dense(
    centres: npt.ArrayLike, shape: tuple[int, int, int], radius: float, label: Label = "gaussian"
) -> npt.NDArray[np.float64]:
    """Equations 1 to 4, or the ball that the paper compares them with, written out over every voxel."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    painted = np.zeros(shape)
    for centre in np.atleast_2d(np.asarray(centres)):
        r = np.linalg.norm(grid - centre, axis=-1)
        sigma_1, sigma_2 = 0.95 * radius / 3, 0.5 * radius / 3
        value = np.exp(-(r**2) / (2 * sigma_1**2)) + np.exp(-(r**2) / (2 * sigma_2**2))
        value = np.ones(shape) if label == "binary" else value / 2
        painted = np.maximum(painted, np.where(r <= radius, value, 0))
    return painted


def _picks(zyx: npt.ArrayLike) -> Picks:
    points = np.asarray(zyx, dtype=np.float64).reshape(-1, 3)
    return Picks(points, np.ones(len(points), dtype=np.float32))


@pytest.mark.parametrize("label", ["gaussian", "binary"])
def test_label_equals_the_equations_over_the_whole_volume(label: Label) -> None:
    rng = np.random.default_rng(1)
    shape = (30, 40, 35)
    # Overlapping particles, particles at and beyond the faces, any sub-voxel phase.
    centres = rng.uniform(-6, np.array(shape) + 6, size=(25, 3))
    painted = paint_targets(_picks(centres), shape, diameter=130.0, voxel_size=10.0, label=label)
    expected = _dense(centres, shape, 6.5, label)
    assert painted.dtype == np.float32
    np.testing.assert_allclose(painted, expected, atol=1e-7)
    assert np.array_equal(painted > 0, expected > 0)


def test_label_is_one_at_a_centre_and_zero_beyond_the_radius() -> None:
    painted = paint_targets(_picks([10, 10, 10]), (21, 21, 21), diameter=20, voxel_size=1)
    assert painted[10, 10, 10] == 1.0
    assert painted[10, 10, 0] > 0
    assert painted[10, 9, 0] == 0
    # Known values of the profile at r / R = 0.2 and 0.5.
    expected = [(np.exp(-(t**2) * 9 / (2 * 0.9025)) + np.exp(-(t**2) * 9 / 0.5)) / 2 for t in (0.2, 0.5)]
    np.testing.assert_allclose(painted[10, 10, [12, 15]], expected, rtol=1e-6)
    assert painted[10, 10, 12] == pytest.approx(0.653, abs=1e-3)


def test_a_label_peaks_at_its_sub_voxel_centre() -> None:
    centre = np.array([12.3, 9.75, 14.5])
    painted = paint_targets(_picks(centre), (25, 25, 25), diameter=20, voxel_size=1).astype(np.float64)
    grid = np.stack(np.meshgrid(*[np.arange(25)] * 3, indexing="ij"), axis=-1)
    mean = (grid * painted[..., None]).sum(axis=(0, 1, 2)) / painted.sum()
    np.testing.assert_allclose(mean, centre, atol=0.02)


@pytest.mark.parametrize("label", ["gaussian", "binary"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [-4.6, 0.0, 11.3])
def test_a_particle_at_a_face_paints_what_it_reaches(label: Label, axis: int, end: float) -> None:
    """The volume is a part of a larger one, whose label is painted the same way."""
    centre = np.full(3, 6.2)
    centre[axis] = end
    painted = paint_targets(_picks(centre), (12, 12, 12), diameter=12, voxel_size=1, label=label)
    larger = paint_targets(_picks(centre + 8), (28, 28, 28), diameter=12, voxel_size=1, label=label)
    assert painted.any()
    np.testing.assert_allclose(painted, larger[8:20, 8:20, 8:20], atol=1e-6)


def test_overlapping_particles_are_combined_by_the_maximum() -> None:
    """Equation 4, for both labels: neither a sum nor what was painted last."""
    places = [[10.3, 10.1, 8.2], [10.0, 10.6, 13.9]]
    for label in LABELS:
        one, two, both = (
            paint_targets(_picks(some), (20, 20, 22), diameter=14, voxel_size=1, label=label)
            for some in (places[:1], places[1:], places)
        )
        assert (np.minimum(one, two) > 0).any()
        np.testing.assert_array_equal(both, np.maximum(one, two))


def test_squared_distances_are_those_to_the_nearest_centre() -> None:
    rng = np.random.default_rng(3)
    centres = rng.uniform(-4, 24, size=(6, 3))
    grid = np.stack(np.meshgrid(*[np.arange(20.0)] * 3, indexing="ij"), axis=-1)
    expected = np.min([((grid - centre) ** 2).sum(axis=-1) for centre in centres], axis=0)
    found = squared_distances(centres, (slice(0, 20),) * 3, 7.5)
    near = expected <= 7.5**2
    np.testing.assert_allclose(found[near], expected[near], rtol=1e-6)
    assert (found[~near] > 7.5**2).all()
    part = squared_distances(centres, (slice(3, 9), slice(5, 20), slice(0, 4)), 7.5)
    np.testing.assert_array_equal(part <= 7.5**2, found[3:9, 5:20, :4] <= 7.5**2)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_box_equals_its_part_of_the_whole(data: st.DataObject) -> None:
    shape = (20, 24, 22)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    centres = rng.uniform(-5, 29, size=(data.draw(st.integers(0, 12)), 3))
    radius = data.draw(st.floats(0.3, 9))
    kinds: list[Label] = ["gaussian", "binary"]
    label = data.draw(st.sampled_from(kinds))
    whole = paint_targets(_picks(centres), shape, diameter=2 * radius, voxel_size=1, label=label)
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
    part = paint_box(centres, (box[0], box[1], box[2]), radius=radius, label=label)
    np.testing.assert_array_equal(part, whole[box])


def test_binary_label_is_a_ball() -> None:
    painted = paint_targets(_picks([8, 8, 8.5]), (17, 17, 17), diameter=50, voxel_size=5, label="binary")
    z, y, x = np.ogrid[:17, :17, :17]
    np.testing.assert_array_equal(painted, ((z - 8) ** 2 + (y - 8) ** 2 + (x - 8.5) ** 2 <= 25).astype("f4"))


def test_no_picks_give_an_empty_label() -> None:
    assert not paint_targets(_picks(np.zeros((0, 3))), (4, 5, 6), diameter=10, voxel_size=1).any()


def test_unknown_label_and_bad_radius_are_refused() -> None:
    with pytest.raises(FormatError, match="'disc'"):
        paint_targets(_picks([1, 1, 1]), (4, 4, 4), diameter=3, voxel_size=1, label="disc")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="radius"):
        paint_targets(_picks([1, 1, 1]), (4, 4, 4), diameter=-3, voxel_size=1)


def test_what_is_farther_away_than_an_integer_can_say_paints_nothing() -> None:
    box = (slice(0, 6), slice(0, 7), slice(0, 8))
    far = [[1e300, 3.0, 3.0], [3.0, -1e300, 3.0]]
    assert not paint_box(far, box, radius=3.0).any()
    near = paint_box([[3.0, 3.0, 3.0]], box, radius=3.0)
    np.testing.assert_array_equal(paint_box([*far, [3.0, 3.0, 3.0]], box, radius=3.0), near)
