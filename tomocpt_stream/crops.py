"""Training crops, drawn from working volumes and their truth: a function of the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tomocpt_stream.blocks import Window, reflect
from tomocpt_stream.errors import SourceError
from tomocpt_stream.targets import Label, paint_box
from tomocpt_stream.windows import normalise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tomocpt_stream.frame import Box, Points, Shape
    from tomocpt_stream.picks import Picks
    from tomocpt_stream.volume import Volume

Float32 = npt.NDArray[np.float32]

# How far a crop may reach beyond the far face, voxels: the lattice's last window does so as well.
_OVERHANG = 24
# Draws of an empty crop before a crowded volume is taken as it is.
_TRIES = 20


class Voxels(Protocol):
    """What a crop is read from: a working `Volume`, or anything that looks like one."""

    @property
    def array(self) -> Any:
        """Un-normalised float32 voxels (z, y, x), read by slices."""

    @property
    def shape(self) -> Shape:
        """Voxels per axis."""

    @property
    def percentiles(self) -> tuple[float, float, float]:
        """p5, p50, p95 of the whole volume."""


@dataclass(frozen=True, eq=False)
class Example:
    """A working volume with its truth; `centres` is (n, 3) zyx working voxels, `negate` turns contrast."""

    volume: Voxels
    centres: Points
    negate: bool = False


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


def example(volume: Volume, picks: Picks, *, negate: bool = False) -> Example:
    """Return an example of a working volume and picks in the voxels of the tomogram's file."""
    centres = volume.grid.to_working(volume.frame.to_source(picks.zyx))
    return Example(volume, centres, negate)


@dataclass(frozen=True)
class Sampling:
    """How crops are drawn: what a network sees, the particle's radius in voxels, the label."""

    window: Window = field(default_factory=Window)
    radius: float = 10.0
    label: Label = "gaussian"
    positive: float = 0.5
    """Share of crops that are drawn around a particle; the others hold none where that is possible."""
    augmentation: Augmentation = field(default_factory=Augmentation)


class Batch(NamedTuple):
    """The crops of one step, each (n, z, y, x): intensities and labels, float32, and whose truth is known.

    `known` is True where the truth of a voxel is known; None says that it is known everywhere.
    """

    voxels: Float32
    label: Float32
    known: npt.NDArray[np.bool_] | None = None


def draw_batch(examples: Sequence[Example], sampling: Sampling, *, size: int, seed: int, step: int) -> Batch:
    """Return the crops of one step.

    The same arguments give the same crops, so a run that goes on needs no state of the loader.
    """
    rng = np.random.default_rng([seed, step])
    pairs = []
    for _ in range(size):
        chosen = examples[int(rng.integers(len(examples)))]
        pairs.append(_draw(chosen, sampling, rng))
    return Batch(np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs]))


def read_crop(chosen: Example, start: Sequence[int], sampling: Sampling) -> tuple[Float32, Float32]:
    """Return the normalised intensities and the label of the crop at `start` (zyx working voxels).

    What lies beyond the faces is the volume reflected, and so is its label, as at prediction.
    """
    volume = chosen.volume
    axes = [
        reflect(low, low + length, whole)
        for low, length, whole in zip(start, sampling.window.shape, volume.shape, strict=True)
    ]
    z, y, x = (slice(int(axis.min()), int(axis.max()) + 1) for axis in axes)
    box: Box = (z, y, x)
    voxels = normalise(np.array(volume.array[box], dtype=np.float32), volume.percentiles)
    label = paint_box(chosen.centres, box, radius=sampling.radius, label=sampling.label)
    inner = np.ix_(*(axis - side.start for axis, side in zip(axes, box, strict=True)))
    return np.negative(voxels[inner]) if chosen.negate else voxels[inner], label[inner]


def augment(
    voxels: Float32, label: Float32, by: Augmentation, rng: np.random.Generator
) -> tuple[Float32, Float32]:
    """Return a crop and its label turned and disturbed; intensities stay within ±3."""
    if by.turns:
        flips = tuple(int(axis) for axis in np.flatnonzero(rng.integers(2, size=3)))
        turns = int(rng.integers(4))
        if voxels.shape[1] != voxels.shape[2]:
            turns = turns // 2 * 2  # a quarter turn would give another shape
        voxels, label = (np.rot90(np.flip(a, flips), turns, axes=(1, 2)) for a in (voxels, label))
    # One draw each, whether used or not, so that switching one change on leaves the others as they were.
    factor, shift, noise, blur, sharpen = (
        rng.normal(),
        rng.normal(),
        rng.random(),
        rng.random(),
        rng.random(),
    )
    if by.blur and blur > 0.5:
        voxels = ndimage.gaussian_filter(voxels, by.blur * (2 * blur - 1))
    elif by.sharpen and sharpen > 0.5:
        voxels = voxels + np.float32(by.sharpen * (2 * sharpen - 1)) * (
            voxels - ndimage.gaussian_filter(voxels, 1.0)
        )
    if by.noise and noise > 0.5:
        white = rng.standard_normal(voxels.shape, dtype=np.float32)
        voxels = voxels + np.float32(by.noise * (2 * noise - 1)) * white
    voxels = voxels * np.float32(np.exp(by.scale * factor)) + np.float32(by.shift * shift)
    return np.ascontiguousarray(np.clip(voxels, -3, 3), dtype=np.float32), np.ascontiguousarray(label)


def check_examples(examples: Sequence[Example], what: str) -> None:
    """Raise SourceError where no example holds a particle."""
    if not any(len(item.centres) for item in examples):
        raise SourceError(
            f"{len(examples)} {what} tomograms without a particle",
            expected="at least one tomogram with at least one particle",
            remedy="check that the coordinates belong to these tomograms",
        )


def _draw(chosen: Example, sampling: Sampling, rng: np.random.Generator) -> tuple[Float32, Float32]:
    length = np.array(sampling.window.shape)
    whole, halo = np.array(chosen.volume.shape), np.array(sampling.window.halo)
    lowest, highest = -halo, np.maximum(-halo, whole - length + _OVERHANG)
    if len(chosen.centres) and rng.random() < sampling.positive:
        centre = chosen.centres[int(rng.integers(len(chosen.centres)))]
        start = np.clip(np.rint(centre) - rng.integers(0, length), lowest, highest)
    else:
        start = _empty(chosen, sampling, rng, (lowest, highest))
    voxels, label = read_crop(chosen, [int(a) for a in start], sampling)
    return augment(voxels, label, sampling.augmentation, rng)


def _empty(
    chosen: Example,
    sampling: Sampling,
    rng: np.random.Generator,
    bounds: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> npt.NDArray[np.int64]:
    """Return the start of a crop that no particle reaches, or of any crop in a crowded volume."""
    start = rng.integers(bounds[0], bounds[1] + 1)
    for _ in range(_TRIES):
        stop = start + np.array(sampling.window.shape) - 1
        nearest = np.clip(chosen.centres, np.maximum(start, 0), stop)
        if not (((chosen.centres - nearest) ** 2).sum(axis=1) <= sampling.radius**2).any():
            break
        start = rng.integers(bounds[0], bounds[1] + 1)
    return start
