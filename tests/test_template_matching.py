from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from orientations import one_of_each, point_group, rotation_error, rotation_list
from scipy.spatial.transform import Rotation
from template_matching import match_template

from tomocpt_stream import match
from tomocpt_stream.phantom import PhantomOptions, simulate_phantom
from tomocpt_stream.shapes import solid_template

Field = npt.NDArray[np.float32]

ALONE = np.eye(3)[None]


def blobs(*places: tuple[float, float, float]) -> Field:
    """Gaussian blobs at x, y, z about the middle of a cube of 25 voxels."""
    z, y, x = np.indices((25, 25, 25)) - 12.0
    density = np.zeros((25, 25, 25), dtype=np.float32)
    for a, b, c in places:
        density += np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 8).astype(np.float32)
    return density


@pytest.mark.parametrize("step", [20.0, 45.0])
def test_a_list_leaves_no_rotation_farther_than_its_step(step: float) -> None:
    listed = rotation_list(step)
    wanted = Rotation.random(300, rng=1).as_matrix()
    nearest = [rotation_error(np.repeat(one[None], len(listed), 0), listed, ALONE).min() for one in wanted]
    assert max(nearest) < step
    volume = 8 * np.pi**2 / np.radians(step) ** 3
    assert volume * 0.8 < len(listed) < volume * 1.2


@pytest.mark.parametrize(
    ("density", "order"),
    [
        (blobs((6, 0, 0), (-6, 0, 0), (0, 6, 0), (0, -6, 0), (0, 0, 5)), 4),  # a pyramid: C4
        (blobs((5, 5, 5), (5, -5, -5), (-5, 5, -5), (-5, -5, 5)), 12),  # a tetrahedron: T
        (blobs((8, 1, 0), (7, 4, 0), (-3, 5, 2), (0, -4, 3), (-1, 2, -7)), 1),
    ],
)
def test_the_point_group_is_found_from_the_map(density: Field, order: int) -> None:
    z, y, x = ((axis * density).sum() / density.sum() for axis in np.indices(density.shape))
    group = point_group(density, (z, y, x))
    assert len(group) == order
    for element in group:  # closed, and made of rotations
        assert np.allclose(element @ element.T, np.eye(3), atol=1e-6)
        products = np.array([element @ other for other in group])
        gaps = [rotation_error(np.repeat(p[None], order, 0), group, ALONE).min() for p in products]
        assert max(gaps) < 3


def test_symmetry_leaves_one_rotation_of_each_set() -> None:
    quarter_turns = Rotation.from_rotvec(np.outer(np.arange(4) * 90, [0, 0, 1]), degrees=True).as_matrix()
    listed = rotation_list(30.0)
    kept = one_of_each(listed, quarter_turns)
    assert len(kept) == pytest.approx(len(listed) / 4, rel=0.15)
    wanted = Rotation.random(200, rng=2).as_matrix()
    nearest = [
        rotation_error(np.repeat(one[None], len(kept), 0), kept, quarter_turns).min() for one in wanted
    ]
    assert max(nearest) < 30


def test_a_rotation_error_is_that_of_the_nearest_equal_rotation() -> None:
    half_turns = Rotation.from_rotvec([[0, 0, 0], [0, 0, 180]], degrees=True).as_matrix()
    true = Rotation.from_euler("ZYZ", [[20, 40, 60]], degrees=True).as_matrix()
    found = Rotation.from_euler("ZYZ", [[20, 40, 60 + 180 + 5]], degrees=True).as_matrix()
    assert rotation_error(found, true, half_turns) == pytest.approx([5.0])
    assert rotation_error(found, true, ALONE) == pytest.approx([175.0])


PHANTOM = PhantomOptions(
    shape=(28, 56, 56), diameter=140.0, particles=("blob:5",), count=6, distractors=4,
    distractor_sizes=(0.3, 0.4), filaments=0, gold=0, vesicles=0, snr=0.2, tilt_step=6.0, dose=0.0,
)  # fmt: skip


def test_particles_are_found_where_they_are_and_as_they_are_turned() -> None:
    phantom = simulate_phantom(PHANTOM, seed=3)
    truth = phantom.picks()
    template = solid_template("blob:5", 140.0, 10.0)
    group = point_group(template.density, template.centre)
    rotations = one_of_each(rotation_list(36.0), group)
    found = match_template(phantom.volume, template, rotations, voxel_size=10.0, imaging=phantom.options)
    assert found.scores.shape == phantom.volume.shape
    assert found.scores.max() <= 1
    picks = found.picks(voxel_size=10.0, diameter=140.0, name=phantom.name)
    best = picks.take(np.arange(len(truth)))
    pairs = match(best, truth, tolerance=70.0)
    assert pairs.f1 == 1
    assert np.median(pairs.distances) < 10
    assert best.rotations is not None
    assert truth.rotations is not None
    errors = rotation_error(best.rotations[pairs.pairs[:, 0]], truth.rotations[pairs.pairs[:, 1]], group)
    assert np.median(errors) < 36


def test_contrast_is_the_microscopes() -> None:
    phantom = simulate_phantom(PHANTOM, seed=3)
    template = solid_template("blob:5", 140.0, 10.0)
    rotations = rotation_list(80.0)
    dark = match_template(phantom.volume, template, rotations, voxel_size=10.0, imaging=phantom.options)
    bright = match_template(
        -phantom.volume,
        template,
        rotations,
        voxel_size=10.0,
        imaging=replace(phantom.options, contrast="bright"),
    )
    assert np.allclose(dark.scores, bright.scores, atol=1e-5)


def test_nothing_matches_in_a_constant_volume() -> None:
    template = solid_template("blob:5", 140.0, 10.0)
    volume = np.full((20, 30, 34), 7.0, dtype=np.float32)
    found = match_template(volume, template, rotation_list(90.0), voxel_size=10.0, imaging=PHANTOM)
    assert np.isfinite(found.scores).all()
    assert np.abs(found.scores).max() < 0.01
