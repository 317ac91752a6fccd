from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tomocpt_stream.errors import SourceError
from tomocpt_stream.shapes import SHAPES_HELD_OUT, SHAPES_TRAIN, solid_template
from tomocpt_stream.specimen import GOLD_DENSITY, Canvas, SpecimenOptions, build_specimen, stamp_of

Voxels = npt.NDArray[Any]
BARE: dict[str, Any] = {"distractors": 0, "filaments": 0, "gold": 0, "vesicles": 0}
PAD = (15, 6, 20)


def small(**changes: Any) -> SpecimenOptions:
    return SpecimenOptions(**{"shape": (48, 96, 96), "diameter": 120.0, "count": 12, **BARE, **changes})


def build(options: SpecimenOptions, seed: int = 0) -> Canvas:
    return build_specimen(options, PAD, np.random.default_rng(seed))


def field_of(canvas: Canvas) -> Voxels:
    """The density in the field of view, zyx."""
    (pz, py, px), (nz, ny, nx) = canvas.pad, canvas.shape
    return canvas.density[pz : pz + nz, px : px + nx, py : py + ny].transpose(0, 2, 1)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from((*SHAPES_TRAIN, *SHAPES_HELD_OUT)),
    offset=st.tuples(*[st.floats(0.0, 1.0)] * 3),
    seed=st.integers(0, 1000),
)
def test_a_stamp_has_its_centre_of_mass_where_it_was_put(
    kind: str, offset: tuple[float, float, float], seed: int
) -> None:
    template = solid_template(kind, 200.0, 10.0)
    quaternion = np.random.default_rng(seed).normal(size=4)
    rotation = matrix_of(quaternion)
    centre = np.array([20.0, 30.0, 40.0]) + offset
    stamp, corner = stamp_of(template, centre, rotation, 10.0)
    measured = np.array(ndimage.center_of_mass(stamp.astype(np.float64))) + corner
    assert np.abs(measured - centre).max() < 0.02
    assert stamp.sum() == pytest.approx(template.density.sum() / 8, rel=0.01)


def matrix_of(quaternion: Voxels) -> Voxels:
    """The textbook matrix of a quaternion (x, y, z, w), for vectors x, y, z."""
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_rotation_turns_the_particle_into_the_tomogram(seed: int) -> None:
    """A rod lies along z of the particle; the mushroom's stem is the tail of its density along -z."""
    rotation = matrix_of(np.random.default_rng(seed).normal(size=4))
    centre = np.array([25.0, 25.0, 25.0])
    rod, corner = stamp_of(solid_template("rod", 200.0, 10.0), centre, rotation, 10.0)
    at = (np.indices(rod.shape).reshape(3, -1).T + corner - centre)[:, ::-1]  # x, y, z
    weights = rod.ravel().astype(np.float64)
    axis = np.linalg.eigh((at * weights[:, None]).T @ at)[1][:, 2]
    assert abs(axis @ rotation[:, 2]) > 0.99
    mushroom, corner = stamp_of(solid_template("mushroom", 200.0, 10.0), centre, rotation, 10.0)
    at = (np.indices(mushroom.shape).reshape(3, -1).T + corner - centre)[:, ::-1]
    skew = (mushroom.ravel()[:, None] * (at @ rotation) ** 3).sum(axis=0)
    assert skew[2] < -5 * np.abs(skew[:2]).max()


def test_counts_roles_and_kinds_are_as_asked() -> None:
    options = small(
        shape=(64, 160, 160),
        particles=("globule", "torus", "blob:3"),
        count=13,
        distractors=5,
        large=2,
        filaments=1,
        gold=2,
        gold_diameter=60.0,
        vesicles=1,
        sheets=1,
        ice=1,
    )
    objects = build(options).objects
    count = {
        role: sum(item.role == role for item in objects) for role in ("target", "gold", "membrane", "ice")
    }
    assert count == {"target": 13, "gold": 2, "membrane": 2, "ice": 1}
    kinds = [item.kind for item in objects if item.role == "target"]
    assert [kinds.count(kind) for kind in options.particles] == [5, 4, 4]
    others = [item for item in objects if item.role == "distractor"]
    assert sum(item.kind == "filament" for item in others) == 1
    assert len(others) == 8
    assert sum(item.diameter > options.diameter for item in others) == 3
    for item in others:
        if item.kind == "filament":
            assert item.diameter > 1.8 * options.diameter
        elif item.diameter > options.diameter:
            assert 1.6 * options.diameter <= item.diameter <= 2.6 * options.diameter
            assert item.kind not in options.particles
        else:
            assert 0.35 * options.diameter <= item.diameter <= 0.6 * options.diameter
            assert item.kind not in options.particles
    assert {item.kind for item in objects if item.role == "membrane"} == {"vesicle", "sheet"}


def test_spheres_keep_their_separation_and_targets_stay_whole() -> None:
    options = small(separation=1.0, gold=3, gold_diameter=60.0, distractors=6)
    canvas = build(options)
    radius = {kind: solid_template(kind, 120.0, 10.0).radius / 10 for kind in options.particles}
    targets = [item for item in canvas.objects if item.role == "target"]
    for index, first in enumerate(targets):
        edge = np.minimum(first.zyx, np.array(options.shape) - 1 - first.zyx)
        assert edge.min() >= radius[first.kind]
        for second in targets[:index]:
            gap = np.linalg.norm(np.array(first.zyx) - second.zyx)
            assert gap >= radius[first.kind] + radius[second.kind]


@pytest.mark.parametrize("separation", [0.5, 0.9])
def test_densities_never_overlap(separation: float) -> None:
    """Where nothing overlaps, the sum of the stamps is nowhere above the densest of them."""
    options = small(
        separation=separation,
        particles=("globule", "rod", "wye"),
        count=16,
        filaments=2,
        distractors=8,
        vesicles=1,
    )
    canvas = build(options, seed=4)
    densest = max(solid_template(kind, 120.0, 10.0).density.max() for kind in options.particles)
    assert canvas.density.max() < max(float(densest), 1.8) + 0.35
    alone = [
        build(replace(options, **{**BARE, "count": 0, name: getattr(options, name)}), seed=4) for name in BARE
    ]
    assert max(float(one.density.max()) for one in alone) < 2.2


def test_less_separation_holds_more() -> None:
    options = small(shape=(32, 56, 56), particles=("rod",), count=30)
    with pytest.raises(SourceError, match=r"no room for target .* of 30"):
        build(replace(options, separation=1.0))
    assert len(build(replace(options, separation=0.5)).objects) == 30


def test_margin_lets_targets_reach_the_faces() -> None:
    canvas = build(small(margin=0.0, count=30, separation=0.6), seed=1)
    nearest = min(min(*item.zyx, *(np.array(canvas.shape) - 1 - item.zyx)) for item in canvas.objects)
    assert 0 <= nearest < 3


def test_a_target_too_large_for_the_field_is_an_error() -> None:
    with pytest.raises(SourceError, match="no room") as caught:
        build(small(shape=(16, 96, 96), diameter=300.0, count=1))
    assert "fewer or smaller" in caught.value.remedy


def test_the_surroundings_are_as_dense_as_the_field() -> None:
    options = small(shape=(48, 96, 96), count=24, particles=("globule",))
    canvas = build_specimen(options, (0, 0, 150), np.random.default_rng(2))
    inside = float(field_of(canvas).mean())
    left, right = (float(part.mean()) for part in (canvas.density[:, :140], canvas.density[:, -140:]))
    assert left == pytest.approx(inside, rel=0.35)
    assert right == pytest.approx(inside, rel=0.35)


def test_only_what_lies_in_the_field_is_listed() -> None:
    canvas = build(small(gold=2, gold_diameter=60.0, distractors=4), seed=3)
    for item in canvas.objects:
        assert (np.array(item.zyx) >= 0).all()
        assert (np.array(item.zyx) <= np.array(canvas.shape) - 1).all()
    _, found = ndimage.label(field_of(canvas) > 0.5)
    assert found >= len(canvas.objects) * 0.9  # touching ones may merge


def test_rotations_are_uniform() -> None:
    canvas = build(small(shape=(64, 200, 200), count=150, diameter=80.0, particles=("globule",)))
    rotations = np.array([item.rotation for item in canvas.objects])
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotations), 1)
    assert np.abs(rotations.mean(axis=0)).max() < 0.2  # uniform: 0 with a deviation of 0.05
    assert np.abs((rotations**2).mean(axis=0) - 1 / 3).max() < 0.1


def test_centres_are_sub_voxel() -> None:
    fractions = np.array([item.zyx for item in build(small(count=30, separation=0.6)).objects]) % 1
    assert np.histogram(fractions, bins=4, range=(0, 1))[0].min() > 8


def test_gold_is_dense() -> None:
    canvas = build(small(count=0, gold=3, gold_diameter=100.0))
    assert canvas.density.max() > 0.8 * GOLD_DENSITY
    assert {item.kind for item in canvas.objects} == {"bead"}
    assert {item.diameter for item in canvas.objects} == {100.0}


def test_a_vesicle_is_a_bilayer_of_the_given_thickness() -> None:
    options = small(shape=(64, 96, 96), voxel_size=4.0, count=0, vesicles=1, membrane_thickness=40.0)
    canvas = build_specimen(options, (0, 0, 0), np.random.default_rng(0))
    middle = canvas.objects[0].zyx
    z, y, x = (round(c) for c in middle)
    line = canvas.density[z, x:, y]
    peaks = np.flatnonzero((line[1:-1] > line[:-2]) & (line[1:-1] >= line[2:]) & (line[1:-1] > 0.4)) + 1
    assert len(peaks) == 2
    assert (peaks[1] - peaks[0]) * 4.0 == pytest.approx(26.0, abs=5.0)  # between the leaflets' middles
    assert line[0] < 0.01


def test_a_sheet_runs_through_the_field() -> None:
    canvas = build(small(count=0, sheets=1), seed=5)
    touched = (field_of(canvas) > 0.3).any(axis=(1, 2))
    assert touched.mean() > 0.9  # seen in nearly every section
    z, y, x = (round(c) for c in canvas.objects[0].zyx)
    assert field_of(canvas)[z - 3 : z + 4, y - 3 : y + 4, x - 3 : x + 4].max() > 0.3


def test_ice_lies_at_a_face() -> None:
    canvas = build(small(count=0, ice=2), seed=1)
    assert [item.zyx[0] in (0.0, 47.0) for item in canvas.objects] == [True, True]
    assert field_of(canvas)[[0, -1]].max() > 1.5


def test_a_seed_gives_the_same_specimen_and_another_does_not() -> None:
    options = small(distractors=3, gold=1, vesicles=1)
    first, again, other = build(options, 1), build(options, 1), build(options, 2)
    assert first.density.tobytes() == again.density.tobytes()
    assert [item.zyx for item in first.objects] == [item.zyx for item in again.objects]
    assert first.density.tobytes() != other.density.tobytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (4, 64, 64)}, "shape"),
        ({"shape": (64, 64)}, "shape"),
        ({"voxel_size": 0.0}, "voxel_size"),
        ({"diameter": float("nan")}, "diameter"),
        ({"diameter": 30.0}, "4 voxels or more"),
        ({"count": -1}, "count"),
        ({"ice": -1}, "ice"),
        ({"particles": ()}, "without a kind"),
        ({"particles": ("sphinx",)}, "sphinx"),
        ({"distractors": 2, "distractor_kinds": ()}, "without a kind"),
        ({"distractor_kinds": ("sphinx",)}, "sphinx"),
        ({"distractor_sizes": (0.6, 0.4)}, "distractor_sizes"),
        ({"separation": 0.0}, "separation"),
        ({"gold_diameter": -5.0}, "gold_diameter"),
    ],
)
def test_options_that_cannot_be_used_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        small(**changes)
