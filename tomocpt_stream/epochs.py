"""Epochs of crops, and which of them are kept for validation.

Crops lie on a grid that covers every voxel. An epoch has each crop that a particle reaches once, and as
many of the others, drawn anew; the crops of a step follow from the seed and the step alone.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tomocpt_stream.crops import LEAST_KNOWN, changed_crop, known_voxels, reaches, stack
from tomocpt_stream.known import PartRegion
from tomocpt_stream.targets import paint_box

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tomocpt_stream.crops import Batch, Example, Sampling, Voxels
    from tomocpt_stream.frame import Box, Points, Shape

STRIDE = 32
# Groups of tomograms from which on whole ones are kept for validation, and the share that is kept.
_GROUPS = 5
_SHARE = 0.2
_LETTERS = "zyx"


class Epochs:
    """The crops of examples, epoch by epoch; `len()` is the number of crops of one epoch.

    `positive` and `negative` are (example, z, y, x) rows: whose crop it is and where it starts, working
    voxels. Crops lie at a stride of 32 voxels from a halo before one face to a halo behind the other, as
    the windows of a prediction do. A crop is positive where a particle's sphere reaches known voxels of it,
    the spheres of particles at and behind a face included, and negative where none does and at least an
    eighth of its voxels are known. Without a particle there are no crops.

    A positive crop is drawn once an epoch, or as often as the weight of its example asks for; a negative
    one at most once. Half of the negatives (`Sampling.hard`) are such as particles of other kinds reach.
    """

    def __init__(self, examples: Sequence[Example], sampling: Sampling, *, seed: int = 0) -> None:
        self.examples, self.sampling, self.seed = list(examples), sampling, seed
        rows = []
        if any(len(item.centres) for item in self.examples):
            rows = [_rows(index, item, sampling) for index, item in enumerate(self.examples)]
        table = np.concatenate([np.zeros((0, 6), np.int64), *rows])
        kind = table[:, 4]
        self.positive, self.negative = (table[kind == sign, :4] for sign in (1, -1))
        self._hard = table[kind == -1, 5] > 0
        weights = np.array([item.weight for item in self.examples])
        self._weights = tuple(weights[part[:, 0]] for part in (self.positive, self.negative))
        self._drawn = int(max(min(1, len(self.positive)), round(self._weights[0].sum())))
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, self.positive)

    def __len__(self) -> int:
        return self._drawn + min(self._drawn, len(self.negative))

    def steps(self, size: int) -> int:
        """Return the number of steps of one epoch in batches of `size`; the last may be smaller."""
        return math.ceil(len(self) / size)

    def batch(self, size: int, step: int) -> Batch:
        """Return the crops of one step, `size` of them or, at the end of an epoch, fewer."""
        epoch, place = divmod(step, self.steps(size))
        crops = []
        for row in range(place * size, min(len(self), (place + 1) * size)):
            index, *start = (int(number) for number in self.order(epoch)[row])
            rng = np.random.default_rng([self.seed, epoch, row])
            crops.append(changed_crop(self.examples[index], start, self.sampling, rng))
        return stack(crops)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the crops of an epoch, rows as those of `positive`, in the order of its steps."""
        kept, order = self._order
        if kept != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(np.concatenate([self._positives(rng), self._negatives(rng)]))
            self._order = (epoch, order)
        return order

    def _positives(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return each positive crop as often as its weight says, a fraction of a time by chance."""
        if not len(self.positive):
            return self.positive
        ends = np.cumsum(self._weights[0])
        # One offset for all: the number of an epoch's crops stays the same.
        passed = np.floor(ends * (self._drawn / ends[-1]) + rng.random())
        passed[-1] = self._drawn
        times = np.diff(passed, prepend=0).astype(np.int64)
        rows: npt.NDArray[np.int64] = np.repeat(self.positive, times, axis=0)
        return rows

    def _negatives(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the negative crops of an epoch, the hard ones first up to their share."""
        count = len(self) - self._drawn
        # The smallest of exponential draws over the weights: a draw by weight that puts nothing back.
        keys = rng.standard_exponential(len(self.negative)) / self._weights[1]
        ranked = np.argsort(keys, kind="stable")
        hard = ranked[self._hard[ranked]][: round(self.sampling.hard * count)]
        rest = ranked[~np.isin(ranked, hard)]
        plain_first = rest[np.argsort(self._hard[rest], kind="stable")]
        rows: npt.NDArray[np.int64] = self.negative[np.concatenate([hard, plain_first])[:count]]
        return rows


@dataclass(frozen=True, eq=False)
class Part:
    """A box of a volume, in itself a volume: its faces reflect, its percentiles are those of the whole."""

    volume: Voxels
    start: Shape
    shape: Shape

    @property
    def array(self) -> Part:
        """Un-normalised voxels (z, y, x), read by slices that lie inside the part."""
        return self

    @property
    def percentiles(self) -> tuple[float, float, float]:
        """p5, p50, p95 of the whole volume."""
        return self.volume.percentiles

    def __getitem__(self, box: Box) -> Any:
        z, y, x = (
            slice(side.start + first, side.stop + first) for side, first in zip(box, self.start, strict=True)
        )
        return self.volume.array[z, y, x]


@dataclass(frozen=True, eq=False)
class Split:
    """Examples to learn from and examples to choose the best by; `remarks` say how they were parted."""

    training: list[Example]
    validation: list[Example]
    remarks: tuple[str, ...]


def split(examples: Sequence[Example], groups: Sequence[str], sampling: Sampling, *, seed: int = 0) -> Split:
    """Part examples into those to learn from and those for validation; a group is never parted by chance.

    From five groups on a fifth of them, drawn by `seed` among those with particles, is for validation.
    With fewer, one contiguous slab of each group is: the fifth at one end of y or x whose share of the
    particles is nearest a fifth. A gap as long as a crop, in which nothing is learnt, parts it from the
    rest. Where a volume is too short for that, or a slab has no particle, the group has no slab.
    """
    members: dict[str, list[Example]] = defaultdict(list)
    for group, item in zip(groups, examples, strict=True):
        members[group].append(item)
    if len(members) < _GROUPS:
        return _slabs(members, sampling)
    able = [group for group, items in members.items() if any(len(item.certain) for item in items)]
    count = min(round(_SHARE * len(members)), len(able) - 1)
    chosen = {able[k] for k in np.random.default_rng([seed, 1]).permutation(len(able))[: max(0, count)]}
    names = ", ".join(sorted(chosen)) or "none, for too few have particles"
    held = sum(len(members[group]) for group in chosen)
    return Split(
        [item for group, items in members.items() if group not in chosen for item in items],
        [item for group, items in members.items() if group in chosen for item in items],
        (f"validation: {held} of {len(groups)} tomograms ({names})",),
    )


def _slabs(members: dict[str, list[Example]], sampling: Sampling) -> Split:
    training: list[Example] = []
    validation: list[Example] = []
    remarks = []
    for group, items in members.items():
        cuts = [cut for axis in (1, 2) for cut in _cuts(items, axis, sampling)]
        if not cuts:
            remarks.append(f"validation: nothing of {group}: too short, or its particles too few to part")
            training += items
            continue
        best = min(cuts, key=lambda cut: abs(cut.share - _SHARE))
        training += best.learnt
        validation += best.held
        unused = f", {best.unused:.0%} in the gap" if best.unused else ""
        remarks.append(f"validation: the {best.where} of {group}, {best.share:.0%} of its particles{unused}")
    return Split(training, validation, tuple(remarks))


@dataclass(frozen=True, eq=False)
class _Cut:
    where: str
    learnt: list[Example]
    held: list[Example]
    share: float
    unused: float
    """Share of the particles that are neither learnt from nor held."""


def _cuts(items: list[Example], axis: int, sampling: Sampling) -> Iterator[_Cut]:
    """Yield the cuts at both ends of an axis that leave particles and a crop's length on both sides."""
    gap = sampling.window.shape[axis]
    for end in ("first", "last"):
        learnt, held, kept, rest = [], [], 0, 0
        for item in items:
            whole = item.volume.shape[axis]
            width = round(_SHARE * whole)
            if whole - width - gap < gap:
                return
            inner, outer = ((0, width), (width + gap, whole))
            if end == "last":
                inner, outer = (whole - width, whole), (0, whole - width - gap)
            held.append(_part(item, axis, inner, sampling.radius))
            learnt.append(_part(item, axis, outer, sampling.radius))
            # By the particles that count: a slab without an annotated one would judge nothing.
            along = item.certain[:, axis]
            kept += int(_reaching(along, inner, sampling.radius).sum())
            rest += int(_reaching(along, outer, sampling.radius).sum())
        if kept and rest:
            total = sum(len(item.certain) for item in items)
            unused = max(0, total - kept - rest) / total
            yield _Cut(f"{end} {_SHARE:.0%} along {_LETTERS[axis]}", learnt, held, kept / total, unused)


def _reaching(along: npt.NDArray[np.float64], span: tuple[int, int], radius: float) -> npt.NDArray[np.bool_]:
    """Return which places along an axis lie within `radius` of a span of it."""
    return np.asarray((along >= span[0] - radius) & (along <= span[1] - 1 + radius))


def _part(item: Example, axis: int, span: tuple[int, int], radius: float) -> Example:
    """Return the part of an example within `span` along an axis, with the particles that reach into it."""
    start, shape = [0, 0, 0], list(item.volume.shape)
    start[axis], shape[axis] = span[0], span[1] - span[0]
    centres: Points = item.centres[_reaching(item.centres[:, axis], span, radius)]
    first = (start[0], start[1], start[2])
    part = Part(item.volume, first, (shape[0], shape[1], shape[2]))
    return replace(
        item,
        volume=part,
        centres=centres - np.array(start, dtype=np.float64),
        annotated=None if item.annotated is None else PartRegion(item.annotated, first),
        doubtful=item.doubtful - np.array(start, dtype=np.float64),
        others=item.others - np.array(start, dtype=np.float64),
    )


def _grid(shape: Shape, sampling: Sampling) -> list[npt.NDArray[np.int64]]:
    """Return the starts of the crops along each axis; the last along an axis is flush with the end."""
    axes = []
    for whole, length, halo in zip(shape, sampling.window.shape, sampling.window.halo, strict=True):
        last = max(-halo, whole + halo - length)
        axes.append(np.array(sorted({*range(-halo, last, STRIDE), last})))
    return axes


def _rows(index: int, item: Example, sampling: Sampling) -> npt.NDArray[np.int64]:
    """Return the crops of an example: (example, z, y, x, kind, hard), 1 for a positive one, -1 or 0."""
    axes = _grid(item.volume.shape, sampling)
    starts = np.array(list(itertools.product(*axes)), dtype=np.int64)
    if item.annotated is None and not len(item.doubtful):
        kind = [1 if _reached(item, item.centres, start, sampling) else -1 for start in starts]
    else:
        labelled, known = (_sums(cells, axes, item, sampling) for cells in _counted(item, axes, sampling))
        voxels = _sums(None, axes, item, sampling)
        kind = np.where(labelled > 0, 1, np.where(known >= LEAST_KNOWN * voxels, -1, 0)).tolist()
    hard = [_reached(item, item.others, start, sampling) for start in starts]
    return np.column_stack([np.full(len(starts), index), starts, kind, hard]).astype(np.int64)


def _reached(item: Example, places: Points, start: npt.NDArray[np.int64], sampling: Sampling) -> bool:
    z, y, x = (
        slice(max(0, int(at)), min(int(at) + length, whole))
        for at, length, whole in zip(start, sampling.window.shape, item.volume.shape, strict=True)
    )
    return reaches(places, (z, y, x), sampling.radius)


def _edges(
    axes: list[npt.NDArray[np.int64]], item: Example, sampling: Sampling
) -> list[npt.NDArray[np.int64]]:
    """Return where crops begin and end inside the volume, along each axis; no crop parts a cell between."""
    return [
        np.unique(np.concatenate([starts, starts + length]).clip(0, whole))
        for starts, length, whole in zip(axes, sampling.window.shape, item.volume.shape, strict=True)
    ]


def _counted(
    item: Example, axes: list[npt.NDArray[np.int64]], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return for each cell its known voxels with a label and all its known voxels, each read once."""
    z, y, x = _edges(axes, item, sampling)
    labelled = np.zeros((len(z) - 1, len(y) - 1, len(x) - 1), dtype=np.int64)
    known = np.zeros_like(labelled)
    for k, j in np.ndindex(labelled.shape[:2]):
        box = (slice(z[k], z[k + 1]), slice(y[j], y[j + 1]), slice(0, x[-1]))
        inside = paint_box(item.centres, box, radius=sampling.radius, label="binary") > 0
        marks = known_voxels(item, box, sampling.radius)
        marks = np.ones_like(inside) if marks is None else marks
        for table, voxels in ((known, marks), (labelled, marks & inside)):
            table[k, j] = np.add.reduceat(voxels.sum(axis=(0, 1), dtype=np.int64), x[:-1])
    return labelled, known


def _sums(
    cells: npt.NDArray[np.int64] | None,
    axes: list[npt.NDArray[np.int64]],
    item: Example,
    sampling: Sampling,
) -> npt.NDArray[np.int64]:
    """Return the sum of the cells of each crop; without cells, its voxels inside the volume."""
    edges = _edges(axes, item, sampling)
    if cells is None:
        z, y, x = (np.diff(edge) for edge in edges)
        cells = z[:, None, None] * y[None, :, None] * x[None, None, :]
    sums = cells
    for axis, (starts, edge) in enumerate(zip(axes, edges, strict=True)):
        whole, length = item.volume.shape[axis], sampling.window.shape[axis]
        summed = np.insert(np.cumsum(sums, axis=axis), 0, 0, axis=axis)
        low, high = (np.searchsorted(edge, at.clip(0, whole)) for at in (starts, starts + length))
        sums = summed.take(high, axis=axis) - summed.take(low, axis=axis)
    return sums.reshape(-1)
