"""The window lattice, the tasks and their memory: integers only.

One lattice covers the whole volume and is anchored to its first voxel. On each axis, window k covers
[k * stride - halo, k * stride - halo + shape) and owns [k * stride, (k + 1) * stride), with
stride = shape - 2 * halo; k runs from 0 to ceil(length / stride) - 1. What a window sees beyond the
faces is the volume reflected. Cropping keeps the owned voxels; blending weighs every voxel of every
window::

    window 0   hhh|ooooooooo|hhh
    window 1            hhh|ooooooooo|hhh          h halo, o owned
    volume        |...................|

A map is stored in cubic chunks that follow from the window alone (or are asked for), never from
memory or workers. A task is a column of whole chunks: its write box. It scores every window that
contributes to a voxel of the write box, so that tasks share nothing but the volume they read, and a
map does not depend on how the chunks were grouped. Within its column a task streams along z: it holds
one row of windows, the scores of one layer of chunks and what the next row adds to, whatever the
depth of the volume; so its memory goes with the cross-section (y, x) alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np

from tomocpt_stream.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tomocpt_stream.frame import Box, Shape

Stitch = Literal["crop", "hann", "gaussian"]
Span = tuple[int, int]
Index = tuple[int, int, int]
_T = TypeVar("_T")

STITCHES: tuple[Stitch, ...] = ("crop", "hann", "gaussian")
TTA_VIEWS = 4  # identity and a flip of each axis

# What a plan may allocate when the caller names no budget, the network's own bytes apart.
DEFAULT_BUFFERS = 640_000_000
# Smallest edge of a stored chunk: 96³ float32 is 3.5 MB, a good object size for disks and stores.
_CHUNK_EDGE = 96
# How far (voxels) the search for peaks looks around a voxel; see `peaks.REACH`, which is at most this.
NEIGHBOURHOOD = 8
# What allocator, codecs, receipts and lists hold beside the buffers; 30 to 60 MB were measured.
_OVERHEAD = 80_000_000
# Chunks of the volume (64³ float32) in flight while a box is read; `predict` holds zarr to this number.
CODEC_CONCURRENCY = 4
# Window-sized weights that a blending task keeps: the faces of the volume have their own.
CACHED_WEIGHTS = 9
_CODEC_CHUNK = 64**3 * 4
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


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


@dataclass(frozen=True)
class Task:
    """A group of windows that share whole chunks of the map.

    `write_spans` are the voxels whose scores the task stores, `window_spans` the windows it scores
    (lattice indices [first, last) per axis), `known_spans` the voxels (a superset of the write box)
    for which these windows are all that contribute, `read_spans` the voxels it reads.
    """

    index: int
    write_spans: tuple[Span, Span, Span]
    window_spans: tuple[Span, Span, Span]
    known_spans: tuple[Span, Span, Span]
    read_spans: tuple[Span, Span, Span]

    @property
    def write(self) -> Box:
        """The box of the map that the task writes: a union of whole chunks."""
        return box_of(self.write_spans)

    @property
    def read(self) -> Box:
        """The box of the volume that the task reads."""
        return box_of(self.read_spans)

    @property
    def known(self) -> Box:
        """The box of the map that the task's windows determine."""
        return box_of(self.known_spans)

    @property
    def windows(self) -> list[Index]:
        """The lattice indices (z, y, x) of the task's windows, in raster order."""
        z, y, x = (range(*span) for span in self.window_spans)
        return list(product(z, y, x))


@dataclass(frozen=True)
class BlockPlan:
    """Every task of one volume and the bytes that the largest of them needs.

    `projected_bytes` counts what the engine allocates for one task at a time, plus
    `bytes_per_window` times the batch where that was given.
    """

    shape: Shape
    window: Window
    stitch: Stitch
    batch_size: int
    tta: bool
    chunk: Shape
    group: Shape
    projected_bytes: int
    memory: int | None = field(default=None, compare=False)

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks in raster order of their write boxes."""
        edges = [axis_groups(n, c, g) for n, c, g in zip(self.shape, self.chunk, self.group, strict=True)]
        return [self._task(index, spans) for index, spans in enumerate(product(*edges))]

    @property
    def windows(self) -> int:
        """Windows scored in all; those at the border of two tasks are counted by both."""
        sizes = enumerate(zip(self.shape, self.chunk, self.group, strict=True))
        return math.prod(
            _extents(n, c, g, self.window, axis, self.stitch).windows for axis, (n, c, g) in sizes
        )

    @property
    def passes_per_voxel(self) -> float:
        """How often the network sees a voxel of the volume on average."""
        views = TTA_VIEWS if self.tta else 1
        return self.windows * views * self.window.voxels / math.prod(self.shape)

    def chunks_of(self, write: tuple[Span, Span, Span]) -> Iterator[tuple[str, Box]]:
        """Yield the key ("z.y.x") and the box of every chunk of a write box."""
        axes = [
            [(start // c, (start, min(start + c, stop))) for start in range(lo, stop, c)]
            for (lo, stop), c in zip(write, self.chunk, strict=True)
        ]
        for chunk in product(*axes):
            yield ".".join(str(k) for k, _ in chunk), box_of(tuple(span for _, span in chunk))

    def task_over(self, task: Task, z: Span) -> Task:
        """Return `task` confined to the chunk layers between two planes: what is left to do of it."""
        return self._task(task.index, (z, *task.write_spans[1:]))

    def _task(self, index: int, write: tuple[Span, ...]) -> Task:
        axes = [
            _axis_task(self.shape[axis], span, self.window, axis, self.stitch)
            for axis, span in enumerate(write)
        ]
        windows, known, read = zip(*axes, strict=True)
        return Task(index, _three(write), _three(windows), _three(known), _three(read))


def plan_blocks(  # noqa: PLR0913  (the public signature of the design)
    shape: Shape,
    window: Window,
    *,
    stitch: Stitch = "crop",
    batch_size: int = 4,
    tta: bool = False,
    bytes_per_window: int | None = None,
    memory: int | str | None = None,
    chunk: int | None = None,
) -> BlockPlan:
    """Return the plan that scores the fewest windows within a memory budget.

    `shape` is the working volume's (zyx), `memory` a number of bytes or a string like "1.5 GB",
    `chunk` the edge of the stored map's chunks in voxels (default: the smallest multiple of the
    window's stride that is at least 96). Without `memory` the engine takes 0.64 GB of buffers beside
    the network's own bytes, or what one column of chunks needs if that is more.

    Raises
    ------
    PlanError
        Where not even a task of one column of chunks fits the budget, or an argument makes no sense.
    """
    sizes = _checked(shape, stitch, batch_size, chunk)
    edges = tuple(chunk or s * -(-_CHUNK_EDGE // s) for s in window.stride)
    network = batch_size * (bytes_per_window or 0)
    budget = None if memory is None else parse_memory(memory)
    limit = DEFAULT_BUFFERS + network if budget is None else budget

    def plan(group: tuple[int, ...]) -> BlockPlan:
        bare = BlockPlan(sizes, window, stitch, batch_size, tta, _three(edges), _three(group), 0, budget)
        return replace(bare, projected_bytes=network + _task_bytes(bare))

    depth, *section = (-(-n // c) for n, c in zip(sizes, edges, strict=True))
    smallest = plan((depth, 1, 1))
    if smallest.projected_bytes > limit and budget is not None:
        raise PlanError(
            f"a task of one column of chunks of {edges} voxels needs {_human(smallest.projected_bytes)} "
            f"({_human(network)} of it for {batch_size} windows of the network)",
            expected=f"at most the memory budget of {_human(budget)}",
            remedy="raise the budget, or lower the batch size or the chunk",
        )
    groups = ((depth, *group) for group in product(*(_group_sizes(count) for count in section)))
    fitting = (candidate for group in groups if (candidate := plan(group)).projected_bytes <= limit)
    return min(fitting, key=_cost, default=smallest)


def parse_memory(memory: int | str) -> int:
    """Return a number of bytes from a number or a string such as "800 MB", "1.5 GB" or "2 GiB"."""
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", memory)
        if found is None or found[2].upper() not in _UNITS:
            raise PlanError(
                f"memory budget {memory!r}",
                expected='a number of bytes or a size with its unit, such as "1.5 GB"',
                remedy="use one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB",
            )
        memory = int(float(found[1]) * _UNITS[found[2].upper()])
    if not memory > 0:  # also what is not a number
        raise PlanError(
            f"memory budget of {memory} bytes", expected="more than none", remedy="give a larger budget"
        )
    return int(memory)


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


def axis_groups(length: int, chunk: int, group: int) -> list[Span]:
    """Return the write spans on an axis when `group` chunks at a time are taken together."""
    step = chunk * group
    return [(start, min(start + step, length)) for start in range(0, length, step)]


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


def _axis_task(
    length: int, write: Span, window: Window, axis: int, stitch: Stitch
) -> tuple[Span, Span, Span]:
    """Return the window, known and read spans of a write span."""
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
    return (first, last), known, (int(seen.min()), int(seen.max()) + 1)


class _Extents(NamedTuple):
    """Over the groups of one axis: windows scored in all, and the largest extents of a group."""

    windows: int
    read: int
    padded: int
    known: int
    write: int


# Bytes a voxel of the rows that a task holds: voxels as read, their reflected copy, fill and mask marks.
_READ_BYTES, _SEEN_BYTES, _MARK_BYTES, _SCORE_BYTES = 4, 4, 2, 4


@lru_cache(maxsize=4096)
def _extents(length: int, chunk: int, group: int, window: Window, axis: int, stitch: Stitch) -> _Extents:
    windows = read = padded = known = write = 0
    for span in axis_groups(length, chunk, group):
        (first, last), known_span, read_span = _axis_task(length, span, window, axis, stitch)
        windows += last - first
        read = max(read, read_span[1] - read_span[0])
        padded = max(padded, (last - first - 1) * window.stride[axis] + window.shape[axis])
        known = max(known, known_span[1] - known_span[0])
        write = max(write, span[1] - span[0])
    return _Extents(windows, read, padded, known, write)


def _task_bytes(plan: BlockPlan) -> int:
    """Return the bytes that the largest task of a plan allocates, the network's own apart."""
    sizes = enumerate(zip(plan.shape, plan.chunk, plan.group, strict=True))
    z, y, x = (_extents(n, c, g, plan.window, axis, plan.stitch) for axis, (n, c, g) in sizes)
    depth = plan.window.shape[0]
    rows = depth * (_SEEN_BYTES + _MARK_BYTES) * y.padded * x.padded
    rows += min(z.read, depth) * (_READ_BYTES + _MARK_BYTES) * y.read * x.read
    scores = _SCORE_BYTES * held_planes(plan) * y.known * x.known
    batches = 4 * plan.window.voxels * (plan.batch_size * (4 if plan.tta else 2) + CACHED_WEIGHTS)
    # One chunk while it is finished: its scores, marks, neighbourhood maxima and the weights scored.
    chunk = math.prod(min(n, c) + 2 * NEIGHBOURHOOD for n, c in zip(plan.shape, plan.chunk, strict=True))
    return rows + scores + batches + 24 * chunk + CODEC_CONCURRENCY * 2 * _CODEC_CHUNK + _OVERHEAD


def held_planes(plan: BlockPlan) -> int:
    """Return the planes of scores that a task holds at once: a layer of chunks and what overlaps it.

    A layer is finished when the planes that its peaks look at are complete; the row of windows that
    completes them reaches at most one window beyond.
    """
    return min(plan.shape[0], plan.chunk[0] + 2 * NEIGHBOURHOOD + plan.window.shape[0])


def _group_sizes(count: int) -> list[int]:
    """Return the group sizes that lead to different numbers of groups of `count` chunks."""
    return sorted({-(-count // groups) for groups in range(1, count + 1)})


def _cost(plan: BlockPlan) -> tuple[int, int, int]:
    """Order plans by windows scored, then by columns (each border is read twice), then by bytes."""
    columns = math.prod(-(-n // (c * g)) for n, c, g in zip(plan.shape, plan.chunk, plan.group, strict=True))
    return plan.windows, columns, plan.projected_bytes


def _checked(shape: Shape, stitch: Stitch, batch_size: int, chunk: int | None) -> Shape:
    """Return the shape as three ints; refuse what no plan can be made for."""
    sizes = tuple(int(n) for n in shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise PlanError(
            f"a volume of shape {shape}", expected="three axes of at least one voxel", remedy="check it"
        )
    if stitch not in STITCHES:
        raise PlanError(
            f"stitch {stitch!r}", expected=f"one of {', '.join(STITCHES)}", remedy="choose one of them"
        )
    if any(int(n) != n or n < 1 for n in (batch_size, 1 if chunk is None else chunk)):
        raise PlanError(
            f"a batch of {batch_size} windows and a chunk of {chunk} voxels",
            expected="a whole number of at least 1 each",
            remedy="give positive numbers",
        )
    return _three(sizes)


def _human(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _three(items: tuple[_T, ...]) -> tuple[_T, _T, _T]:
    z, y, x = items
    return (z, y, x)
