from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mrcfile
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import SourceError
from tomocpt_stream.shapes import (
    OVERSAMPLING,
    SHAPES_DISTRACTOR,
    SHAPES_HELD_OUT,
    SHAPES_TRAIN,
    Template,
    is_map,
    map_template,
    solid,
    solid_template,
)
from tomocpt_stream.specimen import stamp_of

if TYPE_CHECKING:
    from pathlib import Path

Voxels = npt.NDArray[Any]
ALL = (*SHAPES_TRAIN, *SHAPES_HELD_OUT, *SHAPES_DISTRACTOR, "filament", "bead")


def measured_length(template: Template, level: float = 0.5) -> float:
    points = np.argwhere(template.density > level).astype(np.float64)
    return float(pdist(points[ConvexHull(points).vertices]).max()) * template.pitch


def test_families_are_disjoint() -> None:
    families = (set(SHAPES_TRAIN), set(SHAPES_HELD_OUT), set(SHAPES_DISTRACTOR))
    assert sum(map(len, families)) == len(set.union(*families))
    assert len(SHAPES_TRAIN) >= 8
    assert len(SHAPES_HELD_OUT) >= 8


def seen_from(kind: str, rotation: Voxels) -> Voxels:
    """Return a solid turned, centred in a box of 24 voxels of 20 Å, with norm 1."""
    stamp, corner = stamp_of(solid_template(kind, 200.0, 20.0), np.full(3, 12.0), rotation, 20.0)
    box = np.zeros((24, 24, 24))
    z, y, x = corner
    edge = stamp.shape[0]
    box[z : z + edge, y : y + edge, x : x + edge] = stamp
    return box.ravel() / np.linalg.norm(box)


def test_no_held_out_shape_is_a_training_one_turned() -> None:
    rotations = Rotation.random(60, random_state=0).as_matrix()
    seen = np.array([seen_from(kind, np.eye(3)) for kind in SHAPES_TRAIN])
    for kind in SHAPES_HELD_OUT:
        turned = np.array([seen_from(kind, rotation) for rotation in rotations])
        assert (seen @ turned.T).max() < 0.95, kind


@pytest.mark.parametrize("kind", ALL)
def test_longest_axis_is_the_diameter_within_a_voxel(kind: str) -> None:
    template = solid_template(kind, 200.0, 10.0)
    assert measured_length(template) == pytest.approx(200.0, abs=10.0)
    assert template.diameter == 200.0


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**30), voxel=st.floats(6.0, 14.0), across=st.floats(16.0, 30.0))
def test_any_blob_at_any_scale_has_the_diameter(seed: int, voxel: float, across: float) -> None:
    template = solid_template(f"blob:{seed}", across * voxel, voxel)
    assert measured_length(template, level=0.4) == pytest.approx(across * voxel, abs=1.5 * voxel)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_a_blob_is_one_piece_inside_its_box(seed: int) -> None:
    template = solid_template(f"blob:{seed}", 200.0, 10.0)
    _, pieces = ndimage.label(template.density > 0.3)
    assert pieces == 1
    shell = np.ones(template.density.shape, dtype=bool)
    shell[1:-1, 1:-1, 1:-1] = False
    assert template.density[shell].max() < 0.02


def test_blobs_of_different_seeds_differ_and_of_one_seed_agree() -> None:
    first, again, other = (solid_template(f"blob:{seed}", 200.0, 10.0) for seed in (5, 5, 6))
    assert np.array_equal(first.density, again.density)
    assert first.density.shape != other.density.shape or not np.allclose(first.density, other.density)


@pytest.mark.parametrize("kind", ["shell", "torus", "barrel"])
def test_hollow_shapes_are_empty_in_the_middle(kind: str) -> None:
    template = solid_template(kind, 300.0, 10.0)
    z, y, x = (round(c) for c in template.centre)
    assert template.density[z, y, x] < 0.1
    assert template.density.max() > 0.8


@pytest.mark.parametrize("kind", ALL)
def test_centre_is_the_centre_of_mass_and_radius_reaches_the_surface(kind: str) -> None:
    template = solid_template(kind, 200.0, 10.0)
    assert template.centre == pytest.approx(
        ndimage.center_of_mass(template.density.astype(np.float64)), abs=1e-6
    )
    outside = np.argwhere(template.density > 0.5) - np.array(template.centre)
    assert np.linalg.norm(outside, axis=1).max() * template.pitch <= template.radius
    assert template.radius < 160.0


def test_density_is_that_of_a_protein_body() -> None:
    template = solid_template("globule", 200.0, 10.0)
    core = template.density[template.density > 0.7]
    assert core.mean() == pytest.approx(1.0, abs=0.15)
    assert 0.03 < core.std() < 0.4  # textured, not flat


@pytest.mark.parametrize("kind", ["nonsense", "blob:", "blob:-1", "blob:x"])
def test_unknown_kind_names_those_that_exist(kind: str) -> None:
    with pytest.raises(SourceError, match=r"globule.*blob:<seed>") as caught:
        solid(kind)
    assert repr(kind) in caught.value.found


def write_map(path: Path, density: Voxels, voxel_size: float) -> str:
    with mrcfile.new(path) as file:
        file.set_data(density.astype(np.float32))
        file.voxel_size = voxel_size
    return str(path)


def ellipsoid_map(half: tuple[float, float, float], edge: int = 40) -> Voxels:
    at = np.indices((edge, edge, edge)) - (edge - 1) / 2
    inside = sum((a / h) ** 2 for a, h in zip(at, half, strict=True)) < 1
    return np.asarray(ndimage.gaussian_filter(17.0 * inside.astype(np.float64), 0.7))


def test_a_map_keeps_its_size_in_angstrom(tmp_path: Path) -> None:
    path = write_map(tmp_path / "long.mrc", ellipsoid_map((8.0, 5.0, 15.0)), 4.0)
    for voxel_size in (6.0, 10.0):
        template = map_template(path, None, voxel_size)
        assert template.kind == "long"
        assert template.pitch == voxel_size / OVERSAMPLING
        assert template.diameter == pytest.approx(120.0, abs=6.0)
        assert measured_length(template, level=0.3) == pytest.approx(120.0, abs=voxel_size)
        assert np.percentile(template.density[template.density > 0.5], 90) == pytest.approx(1.0, abs=0.15)
        volume = template.density.sum() * template.pitch**3
        assert volume == pytest.approx(4 / 3 * np.pi * 8 * 5 * 15 * 4.0**3, rel=0.2)


def test_a_map_is_scaled_when_asked(tmp_path: Path) -> None:
    path = write_map(tmp_path / "m.mrc", ellipsoid_map((8.0, 5.0, 15.0)), 4.0)
    template = map_template(path, 240.0, 10.0)
    assert template.diameter == pytest.approx(240.0)
    assert measured_length(template) == pytest.approx(240.0, abs=10.0)


def test_a_map_loses_its_solvent_noise(tmp_path: Path) -> None:
    density = ellipsoid_map((8.0, 8.0, 8.0))
    density += np.random.default_rng(0).normal(scale=0.2, size=density.shape)
    template = map_template(write_map(tmp_path / "m.mrc", density, 5.0), None, 10.0)
    assert template.density[0].max() < 0.01
    assert template.diameter == pytest.approx(80.0, abs=8.0)


def test_a_map_without_density_is_an_error(tmp_path: Path) -> None:
    path = write_map(tmp_path / "dark.mrc", -1 - ellipsoid_map((5.0, 5.0, 5.0)), 5.0)
    with pytest.raises(SourceError, match=r"dark\.mrc"):
        map_template(path, None, 10.0)


def test_names_of_maps() -> None:
    assert is_map("a/b.MRC")
    assert is_map("6qzp.map.gz")
    assert not is_map("globule")


def test_shared_maps_have_their_known_lengths(shared_data: Path) -> None:
    for name, length in (("6pxm", 130.0), ("1f4a", 180.0), ("7n4y", 250.0)):
        template = map_template(str(shared_data / "maps_10A" / f"{name}.mrc"), None, 10.0)
        assert template.diameter == pytest.approx(length, abs=10.0)
