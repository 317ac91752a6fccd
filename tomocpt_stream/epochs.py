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

from tomocpt_stream.crops import Batch, augment, read_crop

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tomocpt_stream.crops import Example, Sampling, Voxels
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
    the windows of a prediction do. A crop is positive where a particle's sphere reaches it, the spheres of
    particles at and behind a face included. Without a particle there are no crops.
    """

    def __init__(self, examples: Sequence[Example], sampling: Sampling, *, seed: int = 0) -> None:
        self.examples, self.sampling, self.seed = list(examples), sampling, seed
        found: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        for index, item in enumerate(self.examples):
            for start in _grid(item.volume.shape, sampling):
                found[_reached(item, start, sampling)].append((index, *start))
        self.positive, self.negative = (
            np.array(found[kind], dtype=np.int64).reshape(-1, 4) for kind in (True, False)
        )
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, self.positive)

    def __len__(self) -> int:
        return len(self.positive) + min(len(self.positive), len(self.negative))

    def steps(self, size: int) -> int:
        """Return the number of steps of one epoch in batches of `size`; the last may be smaller."""
        return math.ceil(len(self) / size)

    def batch(self, size: int, step: int) -> Batch:
        """Return the crops of one step, `size` of them or, at the end of an epoch, fewer."""
        epoch, place = divmod(step, self.steps(size))
        pairs = []
        for row in range(place * size, min(len(self), (place + 1) * size)):
            index, *start = (int(number) for number in self.order(epoch)[row])
            voxels, label = read_crop(self.examples[index], start, self.sampling)
            rng = np.random.default_rng([self.seed, epoch, row])
            pairs.append(augment(voxels, label, self.sampling.augmentation, rng))
        return Batch(np.stack([voxels for voxels, _ in pairs]), np.stack([label for _, label in pairs]))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the crops of an epoch, rows as those of `positive`, in the order of its steps."""
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            count = len(self) - len(self.positive)
            others = self.negative[rng.choice(len(self.negative), count, replace=False)]
            self._order = (epoch, rng.permutation(np.concatenate([self.positive, others])))
        return self._order[1]


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
    able = [group for group, items in members.items() if any(len(item.centres) for item in items)]
    count = min(round(_SHARE * len(members)), len(able) - 1)
    chosen = {able[k] for k in np.random.default_rng([seed, 1]).permutation(len(able))[: max(0, count)]}
    names = ", ".join(sorted(chosen)) or "none, for too few have particles"
    return Split(
        [item for group, items in members.items() if group not in chosen for item in items],
        [item for group, items in members.items() if group in chosen for item in items],
        (f"validation: {len(chosen)} of {len(members)} tomograms ({names})",),
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
        remarks.append(f"validation: the {best.where} of {group}, {best.share:.0%} of its particles")
    return Split(training, validation, tuple(remarks))


@dataclass(frozen=True, eq=False)
class _Cut:
    where: str
    learnt: list[Example]
    held: list[Example]
    share: float


def _cuts(items: list[Example], axis: int, sampling: Sampling) -> Iterator[_Cut]:
    """Yield the cuts at both ends of an axis that leave particles and a crop's length on both sides."""
    gap = sampling.window.shape[axis]
    for end in ("first", "last"):
        learnt, held = [], []
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
        kept, rest = (sum(len(item.centres) for item in side) for side in (held, learnt))
        if kept and rest:
            total = sum(len(item.centres) for item in items)
            yield _Cut(f"{end} {_SHARE:.0%} along {_LETTERS[axis]}", learnt, held, kept / total)


def _part(item: Example, axis: int, span: tuple[int, int], radius: float) -> Example:
    """Return the part of an example within `span` along an axis, with the particles that reach into it."""
    start, shape = [0, 0, 0], list(item.volume.shape)
    start[axis], shape[axis] = span[0], span[1] - span[0]
    along = item.centres[:, axis]
    centres: Points = item.centres[(along >= span[0] - radius) & (along <= span[1] - 1 + radius)]
    part = Part(item.volume, (start[0], start[1], start[2]), (shape[0], shape[1], shape[2]))
    return replace(item, volume=part, centres=centres - np.array(start, dtype=np.float64))


def _grid(shape: Shape, sampling: Sampling) -> Iterator[tuple[int, ...]]:
    """Return the starts of the crops (zyx working voxels); the last along an axis is flush with the end."""
    axes = []
    for whole, length, halo in zip(shape, sampling.window.shape, sampling.window.halo, strict=True):
        last = max(-halo, whole + halo - length)
        axes.append(sorted({*range(-halo, last, STRIDE), last}))
    return itertools.product(*axes)


def _reached(item: Example, start: Sequence[int], sampling: Sampling) -> bool:
    low = np.maximum(start, 0)
    high = np.minimum(np.add(start, sampling.window.shape), item.volume.shape) - 1
    away = item.centres - np.clip(item.centres, low, high)
    return bool(((away**2).sum(axis=1) <= sampling.radius**2).any())
