from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import fft

from tomocpt_stream.augmentation import Augmentation, Changes, within_tilts
from tomocpt_stream.errors import PlanError

ALL: dict[str, Any] = {
    "turns": True, "scale": 0.3, "shift": 0.2, "noise": 0.5, "blur": 1.0, "sharpen": 0.5, "tilt": 15.0,
    "zoom": 0.1, "gamma": 0.3, "wedge": 40.0, "filters": 0.3,
}  # fmt: skip
Float32 = npt.NDArray[np.float32]


def _crop(seed: int = 0, shape: tuple[int, int, int] = (24, 20, 20)) -> Float32:
    return np.float32(0.5) * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _disturbed(by: Augmentation, seed: int, voxels: Float32 | None = None) -> Float32:
    return Changes(by, np.random.default_rng(seed)).disturb(_crop() if voxels is None else voxels)


def test_nothing_changes_by_default() -> None:
    for seed in range(4):
        changes = Changes(Augmentation(), np.random.default_rng(seed))
        assert changes.pose is None
        np.testing.assert_array_equal(changes.turn(changes.disturb(_crop())), _crop())
    assert set(ALL) | {"wedge_axis"} == {one.name for one in fields(Augmentation)}


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("turns", "tilt", "zoom")])
def test_a_change_of_intensities_is_drawn_by_seed_and_stays_within_bounds(name: str) -> None:
    by = Augmentation(**{name: ALL[name]})
    results = [_disturbed(by, seed) for seed in range(8)]
    assert any(not np.array_equal(result, _crop()) for result in results)
    assert len({result.tobytes() for result in results}) > 2
    for seed, result in enumerate(results):
        assert result.dtype == np.float32
        assert np.abs(result).max() <= 3
        np.testing.assert_array_equal(result, _disturbed(by, seed))


@pytest.mark.parametrize("name", ["turns", "blur", "sharpen", "tilt", "zoom", "wedge", "filters"])
def test_switching_a_change_on_leaves_what_the_others_draw(name: str) -> None:
    """A constant crop shows noise, factor and shift alone: the other changes leave it as it is."""
    even = np.full((12, 10, 10), 0.25, np.float32)
    without = Augmentation(noise=0.2, scale=0.2, shift=0.1)
    for seed in range(6):
        found = _disturbed(replace(without, **{name: ALL[name]}), seed, even)
        np.testing.assert_allclose(found, _disturbed(without, seed, even), atol=1e-6)


@pytest.mark.parametrize("name", ["noise", "blur", "sharpen", "gamma", "wedge", "filters"])
def test_switching_a_shift_on_leaves_what_the_others_draw(name: str) -> None:
    small = np.float32(0.25) * _crop()
    for seed in range(6):
        alone, shifted = (
            _disturbed(Augmentation(**{name: ALL[name]}, shift=shift), seed, small) for shift in (0, 0.1)
        )
        added = _disturbed(Augmentation(shift=0.1), seed, np.zeros_like(small))
        np.testing.assert_allclose(shifted - alone, added, atol=1e-5)


def test_pose_and_turns_do_not_hang_on_each_other() -> None:
    voxels = _crop(shape=(6, 6, 6))
    for seed in range(6):
        every = Changes(Augmentation(**ALL), np.random.default_rng(seed))
        posed = Changes(Augmentation(tilt=15, zoom=0.1), np.random.default_rng(seed))
        turned = Changes(Augmentation(turns=True), np.random.default_rng(seed))
        assert (every.pose is None) == (posed.pose is None)
        if every.pose is not None and posed.pose is not None:
            np.testing.assert_array_equal(every.pose.matrix, posed.pose.matrix)
        np.testing.assert_array_equal(every.turn(voxels), turned.turn(voxels))


def test_turns_keep_voxels_together_and_the_beam_axis() -> None:
    voxels = np.linspace(-1, 1, 16**3, dtype=np.float32).reshape(16, 16, 16)
    planes = {tuple(np.unique(plane)) for plane in voxels}
    seen = set()
    for seed in range(64):
        changes = Changes(Augmentation(turns=True), np.random.default_rng(seed))
        turned, marks = changes.turn(voxels), changes.turn(voxels > 0.25)
        np.testing.assert_array_equal(turned > 0.25, marks)
        # A plane across the beam stays a plane across the beam.
        assert {tuple(np.unique(plane)) for plane in turned} == planes
        seen.add((*turned[0, 0, :2], turned[0, 1, 0]))
    assert len(seen) == 16


def test_crops_longer_than_wide_keep_their_shape_when_turned() -> None:
    voxels = np.linspace(0, 1, 4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    for seed in range(8):
        turned = Changes(Augmentation(turns=True), np.random.default_rng(seed)).turn(voxels)
        assert turned.shape == voxels.shape
        np.testing.assert_array_equal(np.sort(turned.ravel()), voxels.ravel())


def test_a_pose_is_a_proper_rotation_within_its_limits() -> None:
    angles: list[float] = []
    zooms: list[float] = []
    for seed in range(200):
        pose = Changes(Augmentation(tilt=15, zoom=0.1), np.random.default_rng(seed)).pose
        if pose is None:
            continue
        rotation = pose.matrix * pose.zoom
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        angle = math.degrees(math.acos(min(1.0, (np.trace(rotation) - 1) / 2)))
        angles.append(angle)
        zooms.append(pose.zoom)
        points = np.random.default_rng(0).normal(size=(5, 3))
        placed = pose.to_crop(points, points[0], points[1])
        np.testing.assert_allclose((placed - points[1]) @ pose.matrix.T + points[0], points, atol=1e-12)
    assert 12 < max(angles) <= 15
    assert 70 < len(angles) < 130
    assert 0.9 <= min(zooms) < 0.92
    assert 1.08 < max(zooms) <= 1.1


@pytest.mark.parametrize("azimuth", [0.0, 0.7, math.pi / 2])
@pytest.mark.parametrize("shape", [(16, 12, 14), (15, 13, 11), (16, 13, 10)])
def test_a_missing_wedge_is_centred(shape: tuple[int, int, int], azimuth: float) -> None:
    """A frequency is there where its opposite is, so that a second cut changes nothing."""
    kept = within_tilts(shape, 50, azimuth)
    voxels = _crop(shape=shape).astype(np.float64)
    once = fft.irfftn(fft.rfftn(voxels) * kept, shape)
    np.testing.assert_allclose(fft.irfftn(fft.rfftn(once) * kept, shape), once, atol=1e-12)
    # Of the full transform nothing is left in the wedge, and all is left beside it.
    full, before = fft.fftn(once), fft.fftn(voxels)
    z, y, x = np.meshgrid(*(fft.fftfreq(n) for n in shape), indexing="ij")
    across = np.abs(math.cos(azimuth) * x + math.sin(azimuth) * y)
    inner = (np.abs(y) < 0.5) & (np.abs(x) < 0.5)
    slope = math.tan(math.radians(50))
    gone, whole = np.abs(z) > slope * across + 1e-6, np.abs(z) < slope * across - 1e-6
    np.testing.assert_allclose(full[gone & inner], 0, atol=1e-10)
    np.testing.assert_allclose(full[whole & inner], before[whole & inner], atol=1e-10)
    assert kept[0, 0, 0]


def test_an_extra_wedge_lies_along_the_beam_and_leaves_the_spread() -> None:
    by = Augmentation(wedge=40)
    cut = 0
    for seed in range(12):
        voxels = _crop(seed, (32, 32, 32))
        result = _disturbed(by, seed, voxels)
        if np.array_equal(result, voxels):
            continue
        cut += 1
        assert result.std() == pytest.approx(voxels.std(), rel=1e-3)
        assert result.mean() == pytest.approx(voxels.mean(), abs=1e-5)
        power = np.abs(fft.rfftn(result)) ** 2
        assert power[~within_tilts(voxels.shape, 60.01)].sum() < 1e-6 * power.sum()
        kept = power[within_tilts(voxels.shape, 39.99)]
        assert (kept > 0).all()
    assert 2 < cut < 10


def test_filters_change_amplitudes_by_radius_alone() -> None:
    voxels = _crop(1, (32, 32, 32))
    before = fft.rfftn(voxels)
    z, y, x = (fft.fftfreq(32), fft.fftfreq(32), fft.rfftfreq(32))
    radius = np.round(
        np.sqrt(z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2), 6
    ).ravel()
    gains = []
    for seed in range(3):
        gain = (fft.rfftn(_disturbed(Augmentation(filters=0.3), seed, voxels)) / before).ravel()
        np.testing.assert_allclose(gain.imag, 0, atol=1e-3)
        assert (gain.real > 0).all()
        for shell in np.unique(radius[radius > 0])[::20]:
            some = gain.real[radius == shell]
            np.testing.assert_allclose(some, some[0], rtol=2e-3)
        gains.append(gain.real)
    assert not np.allclose(gains[0], gains[1], rtol=0.02)


def test_gamma_bends_about_the_median() -> None:
    ramp = np.linspace(-2.5, 2.5, 5 * 4 * 5, dtype=np.float32).reshape(5, 4, 5)
    for seed in range(4):
        bent = _disturbed(Augmentation(gamma=0.3), seed, ramp)
        assert (np.diff(bent.ravel()) >= 0).all()
        near = np.abs(ramp) < 0.1
        np.testing.assert_allclose(bent[near], ramp[near], atol=0.01)
        assert np.abs(bent - ramp).max() > 0.01


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2)])
def test_any_crop_survives(shape: tuple[int, int, int]) -> None:
    for voxels in (np.zeros(shape, np.float32), np.full(shape, 3, np.float32)):
        for seed in range(6):
            changes = Changes(Augmentation(**ALL), np.random.default_rng(seed))
            assert np.isfinite(changes.turn(changes.disturb(voxels))).all()


@pytest.mark.parametrize(
    "asked", [{"tilt": 16}, {"tilt": -1}, {"zoom": 0.6}, {"wedge": 61}, {"noise": math.nan},
              {"scale": -0.1}, {"wedge_axis": "x"}],
)  # fmt: skip
def test_what_would_make_a_label_false_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"augmentation with {next(iter(asked))}"):
        Augmentation(**asked)
