from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tomocpt_stream.errors import SourceError
from tomocpt_stream.imaging import (
    WIENER,
    Geometry,
    ImagingOptions,
    back_project,
    expose,
    plan_geometry,
    project,
    tilt_matrix,
    transfer,
)

Voxels = npt.NDArray[Any]
# The image is the projection itself: amplitude contrast alone, no envelope, no damage, no noise.
PLAIN: dict[str, Any] = {
    "defocus": 0.0,
    "amplitude_contrast": 1.0,
    "b_factor": 0.0,
    "dose": 0.0,
    "snr": math.inf,
}


def blurred_point(shape: tuple[int, int, int], at: tuple[float, float, float], width: float = 2.0) -> Voxels:
    """Return a Gaussian (z, x, y) at a point given as zyx."""
    z, x, y = (np.arange(n) for n in shape)
    dz, dx, dy = (z - at[0])[:, None, None], (x - at[2])[None, :, None], (y - at[1])[None, None, :]
    point: Voxels = np.exp(-(dz**2 + dx**2 + dy**2) / (2 * width**2)).astype(np.float32)
    return point


def test_tilts_are_symmetric_and_forty_one_by_default() -> None:
    tilts = ImagingOptions().tilts
    assert len(tilts) == 41
    assert (tilts == -tilts[::-1]).all()
    assert (tilts[0], tilts[20], tilts[-1]) == (-60, 0, 60)
    assert list(ImagingOptions(tilt_range=5, tilt_step=2).tilts) == [-4, -2, 0, 2, 4]
    assert list(ImagingOptions(tilt_range=0).tilts) == [0]


@settings(max_examples=25, deadline=None)
@given(angle=st.floats(-1.3, 1.3), z=st.integers(0, 8), x=st.integers(0, 12))
def test_a_voxel_keeps_its_mass_and_falls_at_its_place(angle: float, z: int, x: int) -> None:
    matrix = tilt_matrix((9, 13), angle, 41)
    plane = np.zeros((9, 13), dtype=np.float32)
    plane[z, x] = 1
    image = matrix @ plane.ravel()
    s = (x - 6) * math.cos(angle) + (z - 4) * math.sin(angle) + 20
    assert image.sum() == pytest.approx(1, abs=1e-6)
    assert image @ np.arange(41) == pytest.approx(s, abs=1e-4)
    assert np.count_nonzero(image) <= 2


def test_what_falls_beside_the_detector_is_lost() -> None:
    image = tilt_matrix((1, 21), 0.0, 5) @ np.ones(21, dtype=np.float32)
    assert (image == 1).all()


def test_the_untilted_projection_is_the_sum_along_z() -> None:
    slab = np.random.default_rng(0).random((6, 11, 5), dtype=np.float32)
    images = project(slab, ImagingOptions(tilt_range=0), 11)
    assert np.allclose(images[0], slab.sum(axis=0), atol=1e-5)


def test_progress_ends_at_the_whole() -> None:
    seen: list[tuple[str, int, int]] = []
    slab = np.ones((4, 9, 5), dtype=np.float32)
    options = ImagingOptions(tilt_range=6)
    geometry = Geometry((4, 5, 9), 10.0, (0, 0, 0), 9, 0)
    images = project(slab, options, 9, lambda *call: seen.append(call))
    back_project(images, options, geometry, lambda *call: seen.append(call))
    assert len(seen) == 10
    assert all(done <= total for _, done, total in seen)
    assert [call[0] for call in seen if call[1] == call[2]] == ["project", "back-project"]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(8, 60), st.integers(8, 60), st.integers(8, 90)),
    tilt_range=st.floats(0, 70),
    thick=st.integers(0, 20),
)
def test_the_slab_fills_the_detector_and_the_detector_sees_the_field(
    shape: tuple[int, int, int], tilt_range: float, thick: int
) -> None:
    options = ImagingOptions(tilt_range=tilt_range)
    geometry = plan_geometry(options, shape, 10.0, thick)
    nz, nx = shape[0] + 2 * geometry.pad[0], shape[2] + 2 * geometry.pad[2]
    s_slice, y_slice = geometry.measured
    assert y_slice.stop - y_slice.start == shape[1]
    for tilt in (options.tilts[0], options.tilts[-1]):
        angle = math.radians(tilt)
        middle = np.ones((nz, nx), dtype=np.float32)
        lit = tilt_matrix((nz, nx), angle, geometry.width) @ middle.ravel()
        assert lit.min() > 0.3 * lit.max()  # no dark border: ice everywhere
        corner = shape[2] / 2 * math.cos(angle) + shape[0] / 2 * abs(math.sin(angle))
        assert (s_slice.stop - s_slice.start) / 2 >= corner - 0.51


def test_full_tilt_series_gives_the_density_back() -> None:
    """Within ±80° and without contrast transfer, a point stays where it was, and dark."""
    options = ImagingOptions(tilt_range=80, tilt_step=1, **PLAIN)
    shape, at = (40, 36, 44), (21.3, 16.8, 19.4)
    geometry = plan_geometry(options, shape, 10.0, 0)
    pz, py, px = geometry.pad
    slab = blurred_point(
        (shape[0] + 2 * pz, shape[2] + 2 * px, shape[1] + 2 * py), (at[0] + pz, at[1] + py, at[2] + px)
    )
    images, _ = expose(project(slab, options, geometry.width), options, geometry, np.random.default_rng(0))
    volume = back_project(images, options, geometry)
    peak = np.unravel_index(volume.argmin(), volume.shape)
    assert np.abs(np.array(peak) - at).max() <= 0.5
    weights = np.maximum(-volume - 0.2 * -volume.min(), 0)
    centre = [(weights * axis).sum() / weights.sum() for axis in np.indices(volume.shape)]
    assert np.abs(np.array(centre) - at).max() < 0.1


def wedge_share(options: ImagingOptions) -> tuple[float, float]:
    """Return the mean power of reconstructed noise inside and outside the missing wedge."""
    shape = (64, 32, 128)
    geometry = plan_geometry(options, shape, 10.0, 0)
    empty = np.zeros((len(options.tilts), geometry.width, 32 + 2 * geometry.pad[1]), dtype=np.float32)
    images, _ = expose(empty, options, geometry, np.random.default_rng(1))
    volume = back_project(images, options, geometry)
    window = np.hanning(64)[:, None, None] * np.hanning(128)[None, None, :]
    power = np.abs(np.fft.fftn(volume * window)) ** 2
    kz, kx = np.abs(np.fft.fftfreq(64))[:, None, None], np.abs(np.fft.fftfreq(128))[None, None, :]
    steepness = np.broadcast_to(kz, power.shape) / np.maximum(np.broadcast_to(kx, power.shape), 1e-9)
    edge = math.tan(math.radians(options.tilt_range))
    ring = np.broadcast_to((np.hypot(kz, kx) > 0.1) & (np.hypot(kz, kx) < 0.4), power.shape)
    return float(power[ring & (steepness > 1.5 * edge)].mean()), float(
        power[ring & (steepness < 0.8 * edge)].mean()
    )


@pytest.mark.parametrize("tilt_range", [45.0, 60.0])
def test_the_missing_wedge_is_empty(tilt_range: float) -> None:
    inside, outside = wedge_share(ImagingOptions(tilt_range=tilt_range))
    assert inside < 0.01 * outside


def line_power(reconstruction_filter: Any, tilt_range: float) -> Voxels:
    """Return the power along x of the middle section of reconstructed noise."""
    options = ImagingOptions(reconstruction_filter=reconstruction_filter, tilt_range=tilt_range)
    geometry = plan_geometry(options, (32, 64, 128), 10.0, 0)
    empty = np.zeros((len(options.tilts), geometry.width, 64 + 2 * geometry.pad[1]), dtype=np.float32)
    images, _ = expose(empty, options, geometry, np.random.default_rng(2))
    volume = back_project(images, options, geometry)
    return np.asarray((np.abs(np.fft.rfft(volume[16] * np.hanning(128), axis=1)) ** 2).mean(axis=0))


def test_noise_is_coloured_by_the_ramp() -> None:
    ramp = line_power("ramp", 60.0)
    assert ramp[20] > 3 * ramp[4]
    single = line_power("ramp", 0.0)
    assert single[40] / single[20] == pytest.approx(4.0, rel=0.35)  # power is the square of |k|


@pytest.mark.parametrize(
    ("name", "edge", "middle"), [("hamming", 0.08, 0.54), ("cosine", 0.0, math.cos(math.pi / 4))]
)
def test_a_taper_damps_the_ramp(name: str, edge: float, middle: float) -> None:
    ratio = np.sqrt(line_power(name, 0.0) / line_power("ramp", 0.0))
    assert ratio[32] == pytest.approx(middle, abs=0.03)
    assert ratio[62] == pytest.approx(edge, abs=0.06)


@pytest.mark.parametrize("snr", [0.05, 0.5])
def test_snr_is_signal_over_noise_variance(snr: float) -> None:
    options = ImagingOptions(snr=snr)
    geometry = plan_geometry(options, (32, 96, 96), 10.0, 8)
    pz, py, px = geometry.pad
    slab = np.zeros((32 + 2 * pz, 96 + 2 * px, 96 + 2 * py), dtype=np.float32)
    slab[::7, ::9, ::11] = 1
    projections = project(slab, options, geometry.width)
    seen, variances = expose(projections.copy(), options, geometry, np.random.default_rng(0))
    clean, none = expose(projections, ImagingOptions(snr=math.inf), geometry, np.random.default_rng(0))
    assert (none == 0).all()
    s, y = geometry.measured
    noise = (seen - clean)[:, s, y]
    signal = clean[:, s, y]
    ratio = signal.var(axis=(1, 2)).mean() / noise.var(axis=(1, 2)).mean()
    assert ratio == pytest.approx(snr, rel=0.02)
    assert np.allclose(noise.var(axis=(1, 2)), variances, rtol=0.08)
    # The path through the slab at 60° is twice as long.
    assert variances[0] / variances[20] == pytest.approx(2.0)
    # White: neighbours do not know one another.
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.01


def test_empty_ice_has_noise_of_variance_one() -> None:
    options = ImagingOptions()
    geometry = plan_geometry(options, (16, 32, 32), 10.0, 0)
    empty = np.zeros((41, geometry.width, 32 + 2 * geometry.pad[1]), dtype=np.float32)
    seen, variances = expose(empty, options, geometry, np.random.default_rng(0))
    assert variances.mean() == pytest.approx(1)
    assert seen.var() == pytest.approx(1, rel=0.05)


def test_contrast_transfer_at_known_points() -> None:
    """Values worked out by hand from sin(pi lambda z q^2 - pi/2 Cs lambda^3 q^4 + asin A)."""
    options = ImagingOptions(defocus=3.0, b_factor=0.0, dose=0.0, tilt_range=0)
    gain, sign = transfer(options, (256, 256), 4.0)
    assert gain.shape == (1, 256, 129)
    assert gain[0, 0, 0] == pytest.approx(0.07)
    q = 32 / (256 * 4.0)
    chi = math.pi * 0.0196876 * 3e4 * q**2 - math.pi / 2 * 2.7e7 * 0.0196876**3 * q**4
    assert gain[0, 0, 32] == pytest.approx(math.sin(chi + math.asin(0.07)), abs=1e-5)
    assert gain[0, 32, 0] == pytest.approx(gain[0, 0, 32], abs=1e-6)
    # First zero where the phase reaches pi: q = sqrt((pi - asin A) / (pi lambda z)), 24.5 Å.
    zero = math.sqrt((math.pi - math.asin(0.07)) / (math.pi * 0.0196876 * 3e4))
    below, above = math.floor(zero * 1024), math.ceil(zero * 1024)
    assert sign[0, below] == 1
    assert sign[0, above] == -1
    assert (sign[gain[0] < 0] == -1).all()


def test_envelope_and_damage_attenuate() -> None:
    plain = transfer(ImagingOptions(b_factor=0.0, dose=0.0), (64, 64), 10.0)[0]
    envelope = transfer(ImagingOptions(b_factor=400.0, dose=0.0), (64, 64), 10.0)[0]
    q2 = (16 / 640) ** 2
    assert envelope[0, 0, 16] / plain[0, 0, 16] == pytest.approx(math.exp(-100 * q2), rel=1e-4)
    damaged = transfer(ImagingOptions(b_factor=0.0, dose=82.0), (64, 64), 10.0)[0]
    kept = damaged[:, 0, 16] / plain[:, 0, 16]
    critical = 0.245 * q2 ** (-1.665 / 2) + 2.81
    assert kept[20] == pytest.approx(
        math.exp(-1.0 / (2 * critical)), rel=1e-4
    )  # untilted: first of 41, 2 each
    assert kept[[0, -1]].min() == pytest.approx(math.exp(-81.0 / (2 * critical)), rel=1e-4)  # the last
    order = np.argsort(-kept)
    assert (np.diff(np.abs(ImagingOptions().tilts[order])) >= 0).all()
    assert np.allclose(damaged[:, 0, 0], plain[:, 0, 0])


def test_flipping_the_phases_rights_the_contrast_of_fine_detail() -> None:
    """A grating beyond the first zero is inverted by the contrast transfer, and flipped back."""
    x = np.arange(96)
    grating = np.broadcast_to(np.cos(2 * np.pi * 44 * x / 96)[None, :, None], (1, 96, 32)).astype(np.float32)
    geometry = Geometry((8, 32, 96), 10.0, (0, 0, 0), 96, 0)
    seen = {}
    for correction in ("none", "flip", "wiener"):
        options = ImagingOptions(
            tilt_range=0, snr=math.inf, b_factor=0.0, dose=0.0, defocus=3.0, ctf_correction=correction
        )
        images, _ = expose(grating, options, geometry, np.random.default_rng(0))
        seen[correction] = float((images * grating).sum())
    assert seen["none"] > 0 > seen["flip"]
    assert seen["flip"] == pytest.approx(-seen["none"], rel=1e-4)
    # |t| becomes t² / (t² + 0.1): weak frequencies come up, and none is divided by nearly nothing.
    passed = seen["flip"] / float((grating**2).sum())
    assert seen["wiener"] / float((grating**2).sum()) == pytest.approx(
        -(passed**2) / (passed**2 + WIENER), rel=1e-3
    )


def test_smoothing_is_a_gaussian_of_the_volume() -> None:
    options = ImagingOptions(tilt_range=20, tilt_step=10, snr=math.inf)
    geometry = plan_geometry(options, (12, 16, 20), 8.0, 2)
    images = np.random.default_rng(0).standard_normal((5, geometry.width, 16 + 2 * geometry.margin))
    sharp, smooth = (
        back_project(images.astype(np.float32), replace(options, smoothing=value), geometry)
        for value in (0.0, 12.0)
    )
    np.testing.assert_allclose(smooth, ndimage.gaussian_filter(sharp, 1.5), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tilt_range": 85.0}, "tilts"),
        ({"tilt_range": -1.0}, "tilts"),
        ({"tilt_step": 0.0}, "tilts"),
        ({"snr": 0.0}, "snr"),
        ({"snr": math.nan}, "snr"),
        ({"defocus": -1.0}, "defocus"),
        ({"dose": math.inf}, "dose"),
        ({"amplitude_contrast": math.nan}, "amplitude_contrast"),
        ({"ctf_correction": "multiply"}, "ctf_correction"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"reconstruction_filter": "hann"}, "reconstruction_filter"),
        ({"contrast": "grey"}, "contrast"),
    ],
)
def test_options_that_cannot_be_used_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        ImagingOptions(**changes)
