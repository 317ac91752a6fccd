"""The microscope of a phantom: tilted projections, contrast transfer, dose, noise, back-projection.

The beam runs along z and the tilt axis along y, so one sparse matrix (x, z) -> s projects every
row y of the specimen alike, and its transpose projects back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage, sparse

from tomocpt_stream.errors import SourceError
from tomocpt_stream.progress import Progress, silent

if TYPE_CHECKING:
    from tomocpt_stream.frame import Shape

Field = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]

WAVELENGTH = 0.0196876
"""Å, electrons of 300 kV."""

WIENER = 0.1
"""Noise over signal that the Wiener-like correction assumes at every frequency."""


@dataclass(frozen=True, kw_only=True)
class ImagingOptions:
    """How the specimen is imaged and reconstructed.

    tilt_range, tilt_step : tilts from -range to +range in degrees; 60 by 3 is 41 images.
    defocus : µm, underfocus positive.
    spherical_aberration : mm.
    amplitude_contrast : share of the contrast that is amplitude contrast.
    b_factor : Å², envelope exp(-B q² / 4) of every image.
    dose : electrons/Å² over the whole series, dose-symmetric from the untilted image; damage
        attenuates by exp(-N / (2 Nc)), Nc = 0.245 q^-1.665 + 2.81 (Grant & Grigorieff 2015, eq. 3).
    snr : variance of the noise-free projection over variance of the noise, per tilt image, whole
        field, at this voxel size, after the contrast transfer; infinity gives no noise. White
        noise; its variance grows as the path through the slab, 1/cos(tilt), and the stated value
        is mean signal variance over mean noise variance of the series.
    ctf_correction : "none", "flip" (phases), or "wiener" (transfer / (transfer² + 0.1)).
    reconstruction_filter : "ramp", or a ramp tapered by a "hamming" or "cosine" window.
    smoothing : Å, standard deviation of a Gaussian low-pass of the volume, the look of a denoised one.
    contrast : "dark" (protein has the lower values, as reconstructed) or "bright".
    """

    tilt_range: float = 60.0
    tilt_step: float = 3.0
    defocus: float = 3.0
    spherical_aberration: float = 2.7
    amplitude_contrast: float = 0.07
    b_factor: float = 300.0
    dose: float = 100.0
    snr: float = 0.05
    ctf_correction: Literal["none", "flip", "wiener"] = "none"
    reconstruction_filter: Literal["ramp", "hamming", "cosine"] = "ramp"
    smoothing: float = 0.0
    contrast: Literal["dark", "bright"] = "dark"

    def __post_init__(self) -> None:
        if not (self.tilt_step > 0 and 0 <= self.tilt_range <= 80):
            raise SourceError(
                f"tilts of ±{self.tilt_range:g}° by {self.tilt_step:g}°",
                expected="a range of 0 to 80 and a step above 0",
                remedy="correct tilt_range and tilt_step",
            )
        if not self.snr > 0:
            raise SourceError(f"snr {self.snr}", expected="a number above 0", remedy="pass inf for no noise")
        for name in (
            "defocus",
            "spherical_aberration",
            "amplitude_contrast",
            "b_factor",
            "dose",
            "smoothing",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SourceError(f"{name} {value}", expected="0 or more", remedy=f"correct {name}")
        for name, allowed in (
            ("ctf_correction", ("none", "flip", "wiener")),
            ("reconstruction_filter", ("ramp", "hamming", "cosine")),
            ("contrast", ("dark", "bright")),
        ):
            if getattr(self, name) not in allowed:
                found, listed = f"{name} {getattr(self, name)!r}", " or ".join(map(repr, allowed))
                raise SourceError(found, expected=listed, remedy=f"correct {name}")

    @property
    def tilts(self) -> Array:
        """The tilts in degrees, lowest first."""
        steps = math.floor(self.tilt_range / self.tilt_step + 1e-9)
        return np.arange(-steps, steps + 1, dtype=np.float64) * self.tilt_step


@dataclass(frozen=True)
class Geometry:
    """The field (shape zyx, Å a voxel), the pads (zyx) of the slab around it, and the detector's width.

    `margin` is how far (voxels) the detector reaches beyond what is measured and reconstructed.
    """

    shape: Shape
    voxel_size: float
    pad: Shape
    width: int
    margin: int

    @property
    def measured(self) -> tuple[slice, slice]:
        """The part (s, y) of an image that shows the field."""
        return (slice(self.margin, self.width - self.margin), slice(self.margin, self.margin + self.shape[1]))


def plan_geometry(options: ImagingOptions, shape: Shape, voxel_size: float, thick: int) -> Geometry:
    """Return a detector that sees the whole field at every tilt, and a slab that fills it at every tilt.

    `thick` is the pad (voxels) along z for what sticks out of the field.
    """
    nz, _, nx = shape
    steepest = math.radians(float(np.abs(options.tilts).max()))
    angles = np.radians(np.abs(options.tilts))
    # Contrast transfer moves a wave of frequency q by wavelength * defocus * q; the highest is Nyquist.
    spread = math.ceil(WAVELENGTH * options.defocus * 1e4 / (2 * voxel_size) / voxel_size) + 4
    width = math.ceil(float((nx * np.cos(angles) + nz * np.sin(angles)).max())) + 2 * spread
    far = (width / 2 + (nz / 2 + thick) * math.sin(steepest)) / math.cos(steepest)
    pad_x = max(spread, math.ceil(far - nx / 2))
    return Geometry(shape, voxel_size, (thick, spread, pad_x), width, spread)


def tilt_matrix(shape_zx: tuple[int, int], angle: float, width: int) -> sparse.csc_array:
    """Return the projection (width, z * x) at `angle` radians about the middle of a z, x plane.

    A voxel at (z, x) from the middle falls at s = x cos + z sin from the detector's middle and is
    shared linearly by the two nearest pixels.
    """
    nz, nx = shape_zx
    z = np.arange(nz) - (nz - 1) / 2
    x = np.arange(nx) - (nx - 1) / 2
    s = (x[None, :] * math.cos(angle) + z[:, None] * math.sin(angle)).ravel() + (width - 1) / 2
    left = np.floor(s).astype(np.int32)
    right_share = (s - left).astype(np.float32)
    rows = np.stack([left, left + 1], axis=1)
    shares = np.stack([1 - right_share, right_share], axis=1)
    shares[(rows < 0) | (rows >= width)] = 0
    indptr = np.arange(0, 2 * s.size + 1, 2, dtype=np.int32)
    return sparse.csc_array(
        (shares.ravel(), np.clip(rows, 0, width - 1).ravel(), indptr), shape=(width, s.size)
    )


def project(slab: Field, options: ImagingOptions, width: int, progress: Progress = silent) -> Field:
    """Return the projections (tilt, s, y) of a slab (z, x, y): sums along the beam, no contrast transfer."""
    nz, nx, ny = slab.shape
    flat = slab.reshape(nz * nx, ny)
    images = np.empty((len(options.tilts), width, ny), dtype=np.float32)
    for index, angle in enumerate(np.radians(options.tilts)):
        images[index] = tilt_matrix((nz, nx), float(angle), width) @ flat
        progress("project", (index + 1) * slab.size, images.shape[0] * slab.size)
    return images


def transfer(options: ImagingOptions, shape: tuple[int, int], voxel_size: float) -> tuple[Field, Field]:
    """Return per tilt the contrast transfer with envelope and damage, and the sign of its phase.

    Both over the half-plane of `scipy.fft.rfft2` of an (s, y) image; positive values leave protein
    dark: the image is the projection times minus the transfer.
    """
    q2 = fft.fftfreq(shape[0], voxel_size)[:, None] ** 2 + fft.rfftfreq(shape[1], voxel_size)[None, :] ** 2
    aberration = (
        math.pi
        * WAVELENGTH
        * q2
        * (options.defocus * 1e4 - 0.5 * options.spherical_aberration * 1e7 * WAVELENGTH**2 * q2)
    )
    phase = np.sin(aberration + math.asin(min(1.0, options.amplitude_contrast)))
    envelope = np.exp(-options.b_factor / 4 * q2)
    with np.errstate(divide="ignore"):
        critical = 0.245 * q2 ** (-1.665 / 2) + 2.81
    tilts = options.tilts
    order = np.empty(len(tilts))
    order[np.lexsort((tilts, np.abs(tilts)))] = np.arange(len(tilts))
    doses = (order + 0.5) * options.dose / len(tilts)
    damage = np.exp(-doses[:, None, None] / (2 * critical)[None])
    return (phase * envelope * damage).astype(np.float32), np.where(phase < 0, -1, 1).astype(np.float32)


def expose(
    images: Field, options: ImagingOptions, geometry: Geometry, rng: np.random.Generator
) -> tuple[Field, Array]:
    """Return images (tilt, s, y) with contrast transfer and noise, and the noise's variance per tilt.

    The signal's variance is that of the given images after the contrast transfer, over the part
    that shows the field. Empty ice has none: its noise has a mean variance of 1.
    """
    gain, sign = transfer(options, images.shape[1:], geometry.voxel_size)
    seen: Field = fft.irfft2(-gain * fft.rfft2(images), s=images.shape[1:]).astype(np.float32)
    signal = np.mean([image[geometry.measured].var(dtype=np.float64) for image in seen])
    path = 1 / np.cos(np.radians(options.tilts))
    noise: Array = (signal / options.snr if signal > 0 else 1.0) * path / path.mean()
    for index, variance in enumerate(noise):
        if variance > 0:
            seen[index] += np.float32(math.sqrt(variance)) * rng.standard_normal(
                seen.shape[1:], dtype=np.float32
            )
    if options.ctf_correction != "none":
        # The gain times its sign is positive: what either correction leaves of the contrast.
        filters = sign if options.ctf_correction == "flip" else gain / (gain**2 + np.float32(WIENER))
        seen = fft.irfft2(filters * fft.rfft2(seen), s=seen.shape[1:]).astype(np.float32)
    return seen, noise


def back_project(
    images: Field, options: ImagingOptions, geometry: Geometry, progress: Progress = silent
) -> Field:
    """Return the weighted back-projection (z, y, x) of images (tilt, s, y) over the field.

    The ramp is |k| of the s axis (Radermacher's weighting of a single-axis series), zero-padded to
    twice the width so that no border meets the other.
    """
    nz, ny, nx = geometry.shape
    rows = np.ascontiguousarray(images[:, :, geometry.measured[1]])
    rows -= rows.mean(axis=1, keepdims=True)
    length = fft.next_fast_len(2 * geometry.width, real=True)
    k = fft.rfftfreq(length)
    taper = {
        "ramp": np.ones_like(k),
        "hamming": 0.54 + 0.46 * np.cos(2 * np.pi * k),
        "cosine": np.cos(np.pi * k),
    }
    ramp = (k * taper[options.reconstruction_filter]).astype(np.float32)[None, :, None]
    filtered: Field = fft.irfft(ramp * fft.rfft(rows, length, axis=1), length, axis=1)[:, : geometry.width]
    filtered = np.ascontiguousarray(filtered, dtype=np.float32)
    volume = np.zeros((nz * nx, ny), dtype=np.float32)
    for index, angle in enumerate(np.radians(options.tilts)):
        volume += tilt_matrix((nz, nx), float(angle), geometry.width).T @ filtered[index]
        progress("back-project", (index + 1) * volume.size, len(filtered) * volume.size)
    field: Field = volume.reshape(nz, nx, ny)
    if options.smoothing:
        field = ndimage.gaussian_filter(field, options.smoothing / geometry.voxel_size)
    return np.ascontiguousarray(field.transpose(0, 2, 1))
