"""Training crops, drawn from working volumes and their truth: a function of the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import KDTree

from tomocpt_stream.augmentation import Augmentation, Changes
from tomocpt_stream.blocks import Window, reflect
from tomocpt_stream.errors import SourceError
from tomocpt_stream.targets import WIDTHS, Label, paint_box, squared_distances
from tomocpt_stream.windows import normalise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tomocpt_stream.augmentation import Pose
    from tomocpt_stream.frame import Box, Points, Shape
    from tomocpt_stream.known import Region
    from tomocpt_stream.picks import Picks
    from tomocpt_stream.volume import Volume

Float32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

# How far a crop may reach beyond the far face, voxels: the lattice's last window does so as well.
_OVERHANG = 24
# Draws of an empty crop before a crowded volume is taken as it is.
_TRIES = 20
# A crop without a particle is worth its while from this share of known voxels on.
LEAST_KNOWN = 1 / 8
# Around a candidate that may be a particle, so many radii are unknown: its own sphere, wherever within
# half a radius of the candidate it lies.
DOUBT = 1.5
# Edge (voxels) of the boxes of a region that places are looked up in.
_ASKED = 64
# Voxels beyond a turned crop that its cubic splines are made from; 0.27 to this power is what is lost.
_SPLINE = 6


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


def _none() -> Points:
    return np.zeros((0, 3))


@dataclass(frozen=True, eq=False)
class Example:
    """A working volume with its truth; all places are (n, 3) zyx working voxels."""

    volume: Voxels
    centres: Points
    """The particles."""
    negate: bool = False
    """Whether intensities are turned, so that protein looks as the network expects it."""
    annotated: Region | None = None
    """Where the truth is known; None is everywhere."""
    doubtful: Points = field(default_factory=_none)
    """What may be particles that nobody labelled: nothing is known around them."""
    others: Points = field(default_factory=_none)
    """Particles of other kinds, which are no particles here."""
    weight: float = 1.0
    """How often its crops are drawn, beside those of other examples."""

    @cached_property
    def certain(self) -> Points:
        """The particles whose centre lies where the truth is known."""
        return self.centres[known_at(self, self.centres)]


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
    hard: float = 0.5
    """Share of the crops without a particle that are drawn where particles of other kinds lie, if known."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    widths: tuple[float, float] = WIDTHS
    """Of the label, f1 and f2 of equation 2."""

    def paint(self, centres: Points, box: Box, *, zoom: float = 1.0) -> Float32:
        """Return the label of a box, for particles that are larger by `zoom`."""
        return paint_box(centres, box, radius=zoom * self.radius, label=self.label, widths=self.widths)


class Crop(NamedTuple):
    """A crop (z, y, x): intensities and label, float32, and which voxels' truth is known; None: all."""

    voxels: Float32
    label: Float32
    known: Bools | None = None


class Batch(NamedTuple):
    """The crops of one step, each (n, z, y, x): intensities and labels, float32, and whose truth is known.

    `known` is True where the truth of a voxel is known; None says that it is known everywhere.
    """

    voxels: Float32
    label: Float32
    known: Bools | None = None


def stack(crops: Sequence[Crop]) -> Batch:
    """Return crops of one shape as a batch."""
    marks = [np.ones(crop.label.shape, bool) if crop.known is None else crop.known for crop in crops]
    partly = any(crop.known is not None for crop in crops)
    return Batch(
        np.stack([crop.voxels for crop in crops]),
        np.stack([crop.label for crop in crops]),
        np.stack(marks) if partly else None,
    )


def draw_batch(examples: Sequence[Example], sampling: Sampling, *, size: int, seed: int, step: int) -> Batch:
    """Return the crops of one step, from examples by their weights.

    The same arguments give the same crops, so a run that goes on needs no state of the loader.
    """
    weights = np.array([item.weight for item in examples])
    crops = []
    for index in range(size):
        rng = np.random.default_rng([seed, step, index])
        chosen = examples[int(rng.choice(len(examples), p=weights / weights.sum()))]
        crops.append(changed_crop(chosen, _start(chosen, sampling, rng), sampling, rng))
    return stack(crops)


def read_crop(chosen: Example, start: Sequence[int], sampling: Sampling) -> tuple[Float32, Float32]:
    """Return the normalised intensities and the label of the crop at `start` (zyx working voxels).

    What lies beyond the faces is the volume reflected, and so is its label, as at prediction.
    """
    crop = _crop(chosen, start, sampling)
    return crop.voxels, crop.label


def changed_crop(chosen: Example, start: Sequence[int], sampling: Sampling, rng: np.random.Generator) -> Crop:
    """Return the crop at `start` (zyx working voxels) after changes that `rng` draws."""
    changes = Changes(sampling.augmentation, rng)
    if changes.pose is None:
        crop = _crop(chosen, start, sampling)
    else:
        crop = _posed(chosen, start, sampling, changes.pose)
    return Crop(
        changes.turn(changes.disturb(crop.voxels)),
        changes.turn(crop.label),
        None if crop.known is None else changes.turn(crop.known),
    )


def known_voxels(chosen: Example, box: Box, radius: float) -> Bools | None:
    """Return in which voxels of a box inside the volume the truth is known; None: in all.

    Unknown is what was not annotated, and what lies within 1.5 radii of a doubtful place and nearer to it
    than to any particle.
    """
    clear = _undoubted(chosen, box, radius)
    if chosen.annotated is None:
        return clear
    z, y, x = ((side.start, side.stop) for side in box)
    marks = chosen.annotated.inside((z, y, x))
    return marks if clear is None else marks & clear


def known_at(chosen: Example, points: Points, radius: float = 0.0) -> Bools:
    """Return for places (n, 3) zyx working voxels whether the truth is known there.

    They were annotated, places beyond a face as the voxel next to them, and where a particle's `radius` is
    given no doubtful place is within 1.5 of it and nearer than any particle. A pick where nothing is known
    is neither right nor wrong.
    """
    marks = np.ones(len(points), dtype=bool)
    if radius and len(chosen.doubtful) and len(points):
        doubt, _ = KDTree(chosen.doubtful).query(points)
        explained = np.full(len(points), np.inf)
        if len(chosen.centres) + len(chosen.others):
            explained, _ = KDTree(np.concatenate([chosen.centres, chosen.others])).query(points)
        marks &= (doubt > DOUBT * radius) | (explained <= doubt)
    if chosen.annotated is None:
        return marks
    limits = np.array(chosen.volume.shape) - 1
    nearest = np.rint(points).clip(0, limits).astype(np.int64)
    # Places near one another are asked together: a stored mask would read its chunk for each.
    cells, which = np.unique(nearest // _ASKED, axis=0, return_inverse=True)
    for cell in range(len(cells)):
        rows = np.flatnonzero((which.reshape(-1) == cell) & marks)
        if len(rows):
            z, y, x = ((int(at.min()), int(at.max()) + 1) for at in nearest[rows].T)
            at_z, at_y, at_x = (nearest[rows] - (z[0], y[0], x[0])).T
            marks[rows] = chosen.annotated.inside((z, y, x))[at_z, at_y, at_x]
    return marks


def reaches(places: Points, box: Box, radius: float) -> bool:
    """Return whether a voxel of a box inside the volume lies in the sphere of one of the places (n, 3)."""
    low, high = (np.array(ends) for ends in zip(*((side.start, side.stop - 1) for side in box), strict=True))
    # From the nearest voxel: a sphere may end between two voxels of the box.
    away = places - np.rint(places).clip(low, high)
    return bool(((away**2).sum(axis=1) <= radius**2).any())


def check_examples(examples: Sequence[Example], what: str) -> None:
    """Raise SourceError where no example holds a particle."""
    if not any(len(item.certain) for item in examples):
        raise SourceError(
            f"{len(examples)} {what} tomograms without a particle",
            expected="at least one tomogram with at least one particle where it was annotated",
            remedy="check that the coordinates belong to these tomograms",
        )


def _crop(chosen: Example, start: Sequence[int], sampling: Sampling) -> Crop:
    axes, box = _reflected(chosen, start, sampling.window.shape)
    label = sampling.paint(chosen.centres, box)
    known = known_voxels(chosen, box, sampling.radius)
    inner = _within(axes, box)
    voxels = _normalised(chosen, axes, box)
    return Crop(voxels, label[inner], None if known is None else known[inner])


def _posed(chosen: Example, start: Sequence[int], sampling: Sampling, pose: Pose) -> Crop:
    """Return a crop that is turned about its middle; what lies beyond the faces is not known in it.

    Intensities are cubic splines through the volume, the label is painted around the turned centres.
    """
    shape = sampling.window.shape
    middle = (np.array(shape) - 1) / 2
    source = np.array(start) + middle
    reach = np.abs(pose.matrix) @ middle
    low = np.floor(source - reach).astype(np.int64) - _SPLINE
    high = np.ceil(source + reach).astype(np.int64) + _SPLINE + 1
    axes, box = _reflected(chosen, low.tolist(), tuple((high - low).tolist()))
    offset = source - pose.matrix @ middle
    voxels = ndimage.affine_transform(
        _normalised(chosen, axes, box), pose.matrix, offset - low, shape, order=3, mode="mirror"
    )
    turned = replace(
        chosen,
        annotated=None,
        centres=pose.to_crop(chosen.centres, source, middle),
        doubtful=pose.to_crop(chosen.doubtful, source, middle),
        others=pose.to_crop(chosen.others, source, middle),
    )
    whole: Box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    label = sampling.paint(turned.centres, whole, zoom=pose.zoom)
    known = known_voxels(turned, whole, pose.zoom * sampling.radius)
    beyond = (low + _SPLINE < 0).any() or (high - _SPLINE > chosen.volume.shape).any()
    if beyond or chosen.annotated is not None:
        z, y, x = ((side.start, side.stop) for side in box)
        marks = np.ones([b - a for a, b in (z, y, x)], bool)
        if chosen.annotated is not None:
            marks = chosen.annotated.inside((z, y, x))
        there = ndimage.affine_transform(
            marks, pose.matrix, offset - [side.start for side in box], shape, order=0, mode="constant"
        )
        known = there if known is None else known & there
    return Crop(voxels, label, known)


def _reflected(
    chosen: Example, start: Sequence[int], shape: Sequence[int]
) -> tuple[list[npt.NDArray[np.int64]], Box]:
    """Return for each axis which voxels of the volume a crop has, and the box that they lie in."""
    axes = [
        reflect(low, low + length, whole)
        for low, length, whole in zip(start, shape, chosen.volume.shape, strict=True)
    ]
    z, y, x = (slice(int(axis.min()), int(axis.max()) + 1) for axis in axes)
    return axes, (z, y, x)


def _within(axes: Sequence[npt.NDArray[np.int64]], box: Box) -> tuple[npt.NDArray[np.int64], ...]:
    return np.ix_(*(axis - side.start for axis, side in zip(axes, box, strict=True)))


def _normalised(chosen: Example, axes: Sequence[npt.NDArray[np.int64]], box: Box) -> Float32:
    volume = chosen.volume
    voxels = normalise(np.array(volume.array[box], dtype=np.float32), volume.percentiles)
    inner: Float32 = voxels[_within(axes, box)]
    return np.negative(inner) if chosen.negate else inner


def _undoubted(chosen: Example, box: Box, radius: float) -> Bools | None:
    """Return which voxels of a box are no nearer to a doubtful place than to a particle; None: all."""
    if not len(chosen.doubtful):
        return None
    reach = DOUBT * radius
    doubt = squared_distances(chosen.doubtful, box, reach)
    explained = squared_distances(np.concatenate([chosen.centres, chosen.others]), box, reach)
    return (doubt > reach * reach) | (explained <= doubt)


def _start(chosen: Example, sampling: Sampling, rng: np.random.Generator) -> list[int]:
    """Return where a crop begins: around a particle, or where there is none."""
    length = np.array(sampling.window.shape)
    whole, halo = np.array(chosen.volume.shape), np.array(sampling.window.halo)
    bounds = (-halo, np.maximum(-halo, whole - length + _OVERHANG))
    start = None
    if not len(chosen.certain) or rng.random() >= sampling.positive:
        start = _empty(chosen, sampling, rng, bounds)
    if start is None:
        start = _around(chosen.certain, sampling, rng, bounds)
    return [int(a) for a in start]


def _around(
    places: Points,
    sampling: Sampling,
    rng: np.random.Generator,
    bounds: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> npt.NDArray[np.int64]:
    """Return the start of a crop that has one of the places somewhere."""
    centre = places[int(rng.integers(len(places)))]
    before = rng.integers(0, sampling.window.shape)
    return np.asarray((np.rint(centre).astype(np.int64) - before).clip(*bounds))


def _empty(
    chosen: Example,
    sampling: Sampling,
    rng: np.random.Generator,
    bounds: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> npt.NDArray[np.int64] | None:
    """Return the start of a crop that no particle reaches, or of any crop in a crowded volume.

    None where no crop was found that is known well enough.
    """
    start = None
    hard = len(chosen.others) > 0 and rng.random() < sampling.hard
    for _ in range(_TRIES):
        drawn = _around(chosen.others, sampling, rng, bounds) if hard else None
        tried = rng.integers(bounds[0], bounds[1] + 1) if drawn is None else drawn
        _, box = _reflected(chosen, tried.tolist(), sampling.window.shape)
        known = known_voxels(chosen, box, sampling.radius)
        if known is not None and known.mean() < LEAST_KNOWN:
            continue
        start = tried
        if not reaches(chosen.centres, box, sampling.radius):
            break
    if start is None and not len(chosen.certain):
        raise SourceError(
            f"no crop with {LEAST_KNOWN:.1%} of known voxels in {_TRIES} draws",
            expected="a tomogram of which enough is annotated",
            remedy="annotate more of it, or leave it out",
        )
    return start
