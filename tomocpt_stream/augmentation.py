"""Changes of crops that leave their truth true, drawn once for a crop and done to all that belongs to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

from tomocpt_stream.errors import PlanError

if TYPE_CHECKING:
    from tomocpt_stream.frame import Points

Float32 = npt.NDArray[np.float32]
Array = TypeVar("Array", Float32, npt.NDArray[np.bool_])

# Every change draws from a stream of its own, so that switching one off leaves the others as they were.
# New ones belong at the end: a stream follows from its place here.
_STREAMS = ("turns", "pose", "fourier", "blur", "noise", "intensity", "gamma")
# The widest tilt range (± degrees) that an extra missing wedge leaves; beyond it there is no data anyway.
_WIDEST = 60.0


@dataclass(frozen=True)
class Augmentation:
    """Changes that leave a crop's truth true; all off by default, as in the paper's preset."""

    turns: bool = False
    """Flips of any axis and turns by 90° about the beam axis, which keep the missing wedge real."""
    scale: float = 0.0
    """Standard deviation of the natural logarithm of a factor on the intensities."""
    shift: float = 0.0
    """Standard deviation of what is added to the intensities, in units of p95 - p5."""
    noise: float = 0.0
    """Largest standard deviation of white noise that is added, in units of p95 - p5."""
    blur: float = 0.0
    """Largest standard deviation (voxels) of a Gaussian blur."""
    sharpen: float = 0.0
    """Largest share of a 1-voxel unsharp mask that is added."""
    tilt: float = 0.0
    """Largest angle (degrees, up to 15) of a turn about any axis, of half of the crops."""
    zoom: float = 0.0
    """Largest relative change of size (0.1: ±10 %), the label's radius included, of the same half."""
    gamma: float = 0.0
    """Standard deviation of the logarithm of an exponent that bends the intensities about their median."""
    wedge: float = 0.0
    """Smallest tilt range (± degrees) that is left to half of the crops, up to 60; 0 takes nothing away."""
    wedge_axis: Literal["y", "any"] = "y"
    """Tilt axis of that missing wedge: y of the tomogram, or any across the beam."""
    filters: float = 0.0
    """Standard deviation of the logarithm of a radial gain: low- and high-pass, and rings as of a CTF."""

    def __post_init__(self) -> None:
        """Refuse what would make a label false."""
        limits = {"tilt": 15.0, "zoom": 0.5, "wedge": _WIDEST}
        for name in ("scale", "shift", "noise", "blur", "sharpen", "gamma", "filters", *limits):
            value, most = getattr(self, name), limits.get(name, math.inf)
            if not (math.isfinite(value) and 0 <= value <= most):
                raise PlanError(
                    f"augmentation with {name} {value}",
                    expected=f"a number from 0 to {most:g}" if name in limits else "0 or a positive number",
                    remedy="pass 0 to leave it out",
                )
        if self.wedge_axis not in ("y", "any"):
            raise PlanError(
                f"augmentation with wedge_axis {self.wedge_axis!r}", expected="y or any", remedy="pass y"
            )


@dataclass(frozen=True, eq=False)
class Pose:
    """A turn and a magnification about the middle of a crop.

    `matrix` (3, 3) takes zyx steps in the crop to zyx steps in the volume.
    """

    matrix: npt.NDArray[np.float64]
    zoom: float

    def to_crop(self, points: Points, source: Points, crop: Points) -> Points:
        """Return points (n, 3) of the volume as crop voxels, where `source` comes to lie at `crop`."""
        placed: Points = (points - source) @ np.linalg.inv(self.matrix).T + crop
        return placed


class Changes:
    """What is done to one crop, drawn from `rng` at once: the same draw gives the same changes.

    `pose` is to be applied where the crop is read, None where it stays as it lies; `disturb` changes
    intensities; `turn` then flips and turns whatever has the crop's voxels.
    """

    def __init__(self, by: Augmentation, rng: np.random.Generator) -> None:
        self._by = by
        self._rng = dict(zip(_STREAMS, rng.spawn(len(_STREAMS)), strict=True))
        self.pose = self._drawn_pose()
        self._flips = tuple(int(axis) for axis in np.flatnonzero(self._rng["turns"].integers(2, size=3)))
        self._quarters = int(self._rng["turns"].integers(4))

    def turn(self, voxels: Array) -> Array:
        """Return voxels (z, y, x) flipped and turned by quarters about the beam."""
        if not self._by.turns:
            return np.ascontiguousarray(voxels)
        quarters = self._quarters
        if voxels.shape[1] != voxels.shape[2]:
            quarters = quarters // 2 * 2  # a quarter turn would give another shape
        return np.ascontiguousarray(np.rot90(np.flip(voxels, self._flips), quarters, axes=(1, 2)))

    def disturb(self, voxels: Float32) -> Float32:
        """Return normalised intensities (z, y, x) disturbed; they stay within ±3. Call it once."""
        by = self._by
        voxels = self._through_fourier(voxels)
        blur, sharpen = self._rng["blur"].random(2)
        if blur > 0.5:
            if by.blur:
                voxels = ndimage.gaussian_filter(voxels, by.blur * (2 * blur - 1))
        elif by.sharpen and sharpen > 0.5:
            edges = voxels - ndimage.gaussian_filter(voxels, 1.0)
            voxels = voxels + np.float32(by.sharpen * (2 * sharpen - 1)) * edges
        noise = self._rng["noise"].random()
        if by.noise and noise > 0.5:
            white = self._rng["noise"].standard_normal(voxels.shape, dtype=np.float32)
            voxels = voxels + np.float32(by.noise * (2 * noise - 1)) * white
        if by.gamma:
            voxels = _bent(voxels, math.exp(by.gamma * self._rng["gamma"].normal()))
        factor, shift = self._rng["intensity"].normal(size=2)
        voxels = voxels * np.float32(math.exp(by.scale * factor)) + np.float32(by.shift * shift)
        return np.asarray(np.clip(voxels, -3, 3), dtype=np.float32)

    def _drawn_pose(self) -> Pose | None:
        rng = self._rng["pose"]
        posed, angle, size = rng.random() > 0.5, *rng.uniform(-1, 1, size=2)
        axis = rng.normal(size=3)
        angle, zoom = math.radians(self._by.tilt * angle), 1 + self._by.zoom * size
        # Resampling costs noise its finest detail, so that half of the crops stay as they are.
        if not posed or (not angle and zoom == 1):
            return None
        return Pose(_rotation(axis / np.linalg.norm(axis), angle) / zoom, zoom)

    def _through_fourier(self, voxels: Float32) -> Float32:
        """Return voxels with a wider missing wedge and another radial gain, their spread as it was.

        The spread is kept because a volume is normalised by its own percentiles whatever it went through.
        """
        by, rng = self._by, self._rng["fourier"]
        cut, widest, azimuth = rng.random(3)
        slope, rings, count, phase = *rng.normal(size=2), rng.uniform(1, 4), rng.uniform(0, 2 * math.pi)
        gain: Float32 | None = None
        if by.filters:
            squared = sum(k * k for k in _frequencies(voxels.shape))
            radius = np.minimum(2 * np.sqrt(squared), 1)  # 1 at Nyquist's frequency
            logarithm = slope * np.cos(math.pi * radius)
            logarithm += rings * np.cos(2 * math.pi * count * radius**2 + phase)
            gain = np.exp(by.filters * logarithm, dtype=np.float32)
        if by.wedge and cut > 0.5:
            angle = by.wedge + (_WIDEST - by.wedge) * widest
            turn = azimuth * math.pi if by.wedge_axis == "any" else 0.0
            kept = within_tilts(voxels.shape, angle, turn)
            gain = kept.astype(np.float32) if gain is None else gain * kept
        if gain is None:
            return voxels
        gain[0, 0, 0] = 1
        filtered: Float32 = fft.irfftn(fft.rfftn(voxels) * gain, voxels.shape)
        mean, left = voxels.mean(), filtered.std()
        filtered -= mean
        if left > 0:
            filtered *= voxels.std() / left
        filtered += mean
        return filtered


def within_tilts(shape: tuple[int, ...], angle: float, azimuth: float = 0.0) -> npt.NDArray[np.bool_]:
    """Return which frequencies of `scipy.fft.rfftn` of `shape` (zyx) a tilt series of ±`angle`° has.

    Those with |kz| <= tan(angle) |kx|, for a tilt axis along y; `azimuth` (radians) turns it about the
    beam. A frequency is there only where its opposite is, so that what is cut once is cut for good.
    """
    z, y, x = _frequencies(shape)
    slope = math.tan(math.radians(angle))
    # Nyquist's frequency stands for both of its signs.
    across = [
        np.abs(math.cos(azimuth) * x + sign * math.sin(azimuth) * y)
        for sign in ((1, -1) if azimuth else (1,))
    ]
    kept = np.abs(z) <= slope * across[0] + 1e-12
    for other in across[1:]:
        edge = (np.abs(y) == 0.5) | (np.abs(x) == 0.5)
        kept = kept & (~edge | (np.abs(z) <= slope * other + 1e-12))
    return np.broadcast_to(kept, (shape[0], shape[1], shape[2] // 2 + 1))


def _frequencies(shape: tuple[int, ...]) -> tuple[Float32, Float32, Float32]:
    """Return the frequencies (cycles a voxel) of the axes z, y, x of `rfftn`, to be broadcast."""
    z, y = (fft.fftfreq(n).astype(np.float32) for n in shape[:2])
    return z[:, None, None], y[None, :, None], fft.rfftfreq(shape[2]).astype(np.float32)[None, None, :]


def _rotation(axis: npt.NDArray[np.float64], angle: float) -> npt.NDArray[np.float64]:
    """Return the rotation by `angle` (radians) about a unit vector, by Rodrigues' formula."""
    a, b, c = axis
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    turned: npt.NDArray[np.float64] = (
        np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    )
    return turned


def _bent(voxels: Float32, exponent: float) -> Float32:
    """Return intensities through a power of their place in ±3, which leaves 0 and the slope there."""
    place = (np.clip(voxels, -3, 3) + 3) / 6
    slope = exponent * 0.5 ** (exponent - 1)
    return np.asarray(6 * (place**exponent - 0.5**exponent) / slope, dtype=np.float32)
