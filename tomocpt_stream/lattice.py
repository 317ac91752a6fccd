"""The lattice of windows: what a window covers, owns and sees, axis by axis; integers only.

One lattice covers the whole volume and is anchored to its first voxel. On each axis, window k covers
[k * stride - halo, k * stride - halo + shape) and owns [k * stride, (k + 1) * stride), with
stride = shape - 2 * halo; k runs from 0 to ceil(length / stride) - 1. What a window sees beyond the
faces is the volume reflected. Cropping keeps the owned voxels; blending weighs every voxel of every
window::

    window 0   hhh|ooooooooo|hhh
    window 1            hhh|ooooooooo|hhh          h halo, o owned
    volume        |...................|
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from tomocpt_stream.errors import PlanError

if TYPE_CHECKING:
    import numpy.typing as npt

    from tomocpt_stream.frame import Box, Shape

Stitch = Literal["crop", "hann", "gaussian"]
Span = tuple[int, int]
Index = tuple[int, int, int]

STITCHES: tuple[Stitch, ...] = ("crop", "hann", "gaussian")

# How far (voxels) the search for peaks looks around a voxel; see `peaks.REACH`, which is at most this.
NEIGHBOURHOOD = 8


@dataclass(frozen=True)
class Window:
    """What a network sees at once (zyx voxels) and the part at each side that it only looks at."""

    shape: Shape = (64, 64, 64)
    halo: Shape = (8, 8, 8)

    def __post_init__(self) -> None:
        """Refuse a window without a voxel of its own."""
        try:
            shape, halo = tuple(int(n) for n in self.shape), tuple(int(n) for n in self.halo)
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"window {self.shape!r} with halo {self.halo!r}",
                expected="three voxels each, z, y, x",
                remedy="give two tuples of three numbers",
            ) from error
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "halo", halo)
        if not len(shape) == len(halo) == 3 or any(
            h < 0 or n <= 2 * h for n, h in zip(shape, halo, strict=True)
        ):
            raise PlanError(
                f"window of {self.shape} voxels with a halo of {self.halo}",
                expected="three axes and a halo below half of the window",
                remedy="give a smaller halo or a larger window",
            )

    @property
    def stride(self) -> Shape:
        """Voxels between the starts of neighbouring windows, per axis."""
        z, y, x = (n - 2 * h for n, h in zip(self.shape, self.halo, strict=True))
        return (z, y, x)

    @property
    def voxels(self) -> int:
        """Voxels of one window."""
        return math.prod(self.shape)

    def lattice(self, shape: Shape) -> Shape:
        """Return the number of windows per axis over a volume of `shape`."""
        z, y, x = (-(-n // s) for n, s in zip(shape, self.stride, strict=True))
        return (z, y, x)

    def span(self, axis: int, k: int) -> Span:
        """Return the voxels [start, stop) that window k covers on an axis; may leave the volume."""
        start = k * self.stride[axis] - self.halo[axis]
        return start, start + self.shape[axis]


class AxisTask(NamedTuple):
    """What a task is on one axis: the voxels it writes and what follows from them.

    `windows` are the lattice indices [first, last) that contribute to a voxel of `write`, `known` the
    voxels near `write` for which these windows are all that contribute, `read` the voxels they see.
    """

    write: Span
    windows: Span
    known: Span
    read: Span


def axis_task(length: int, write: Span, window: Window, axis: int, stitch: Stitch) -> AxisTask:
    """Return what a task that writes a span of an axis scores, knows and reads there."""
    stride = window.stride[axis]
    first, last = _contributing(length, write, window, axis, stitch)
    count = -(-length // stride)
    if stitch == "crop":
        known = (first * stride, last * stride)
    else:  # up to where the neighbouring window that is not scored begins to contribute
        low = 0 if first == 0 else window.span(axis, first - 1)[1]
        high = length if last == count else window.span(axis, last)[0]
        known = (low, high)
    # Peaks look a few voxels beyond the write box; more of the known scores would be kept for nothing.
    known = (
        max(known[0], write[0] - NEIGHBOURHOOD, 0),
        min(known[1], write[1] + NEIGHBOURHOOD, length),
    )
    seen = reflect(window.span(axis, first)[0], window.span(axis, last - 1)[1], length)
    return AxisTask(write, (first, last), known, (int(seen.min()), int(seen.max()) + 1))


def _contributing(length: int, write: Span, window: Window, axis: int, stitch: Stitch) -> Span:
    """Return the windows [first, last) that contribute to the voxels of a write span."""
    stride, halo, size = window.stride[axis], window.halo[axis], window.shape[axis]
    count = -(-length // stride)
    if stitch == "crop":
        return write[0] // stride, min(count, -(-write[1] // stride))
    # window k ends at k * stride - halo + size and starts at k * stride - halo
    first = (write[0] + halo - size) // stride + 1
    last = -(-(write[1] + halo) // stride)
    return max(0, first), min(count, last)


def reflect(start: int, stop: int, length: int) -> npt.NDArray[np.intp]:
    """Return the voxels of an axis that stand at [start, stop) when it is reflected at both faces.

    The face's own voxel is not repeated: ... 2 1 | 0 1 2 ... ; an axis of one voxel repeats it.
    """
    if length == 1:
        return np.zeros(stop - start, dtype=np.intp)
    period = 2 * (length - 1)
    folded = np.arange(start, stop, dtype=np.intp) % period
    return np.minimum(folded, period - folded)


def box_of(spans: tuple[Span, ...]) -> Box:
    """Return the box of three spans."""
    z, y, x = (slice(start, stop) for start, stop in spans)
    return (z, y, x)


def spans_of(box: Box) -> tuple[Span, Span, Span]:
    """Return the three spans of a box."""
    z, y, x = ((int(part.start), int(part.stop)) for part in box)
    return (z, y, x)
