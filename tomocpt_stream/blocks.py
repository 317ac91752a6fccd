"""Tasks over the lattice of windows, their memory, and the plan that finishes first: integers only.

A map is stored in cubic chunks that follow from the window alone (or are asked for), never from
memory or workers. A task is a box of whole chunks, its write box: a column through the whole depth,
or a part of one where several workers finish earlier so. It scores every window that contributes to
a voxel of the write box, so that tasks share nothing but the volume they read, and a map does not
depend on how the chunks were grouped. Within its box a task streams along z: it holds one row of
windows, the scores of one layer of chunks and what the next row adds to, whatever the depth of the
volume; so its memory goes with the cross-section (y, x) alone.

The memory of a plan is that of one worker process. A worker that computes a task reads ahead: the
next row of windows of this task, or, once this one has read its last, the first row of the next one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, TypeVar, overload

import numpy as np

from tomocpt_stream.errors import PlanError
from tomocpt_stream.lattice import (
    NEIGHBOURHOOD,
    STITCHES,
    AxisTask,
    Index,
    Span,
    Stitch,
    Window,
    axis_task,
    box_of,
    reflect,
    spans_of,
)
from tomocpt_stream.schedule import first_to_finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt

    from tomocpt_stream.frame import Box, Shape

__all__ = [
    "CACHED_WEIGHTS",
    "CODEC_CONCURRENCY",
    "DEFAULT_BUFFERS",
    "NEIGHBOURHOOD",
    "STITCHES",
    "BlockPlan",
    "Index",
    "Span",
    "Stitch",
    "Task",
    "Tasks",
    "Window",
    "axis_groups",
    "box_of",
    "held_planes",
    "parse_memory",
    "plan_blocks",
    "reflect",
    "spans_of",
]

_T = TypeVar("_T")

TTA_VIEWS = 4  # identity and a flip of each axis

# What a plan may allocate when the caller names no budget, the network's own bytes apart.
DEFAULT_BUFFERS = 800_000_000
# Smallest edge of a stored chunk: 96³ float32 is 3.5 MB, a good object size for disks and stores.
_CHUNK_EDGE = 96
# What allocator, codecs, receipts and lists hold beside the buffers; 30 to 60 MB were measured.
_OVERHEAD = 80_000_000
# Chunks of the volume (64³ float32) in flight while a box is read; `predict` holds zarr to this number.
CODEC_CONCURRENCY = 4
# Window-sized weights that a blending task keeps: the faces of the volume have their own.
CACHED_WEIGHTS = 9
_CODEC_CHUNK = 64**3 * 4
# Bytes a voxel of the rows that a task holds: voxels as read, their reflected copy, fill and mask marks.
_READ_BYTES, _SEEN_BYTES, _MARK_BYTES, _SCORE_BYTES = 4, 4, 2, 4
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True, slots=True)
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

    @property
    def window_count(self) -> int:
        """The number of the task's windows."""
        return math.prod(last - first for first, last in self.window_spans)


AxisTasks = tuple[AxisTask, ...]


@dataclass(frozen=True, repr=False)
class Tasks(Sequence[Task]):
    """The tasks of a plan in raster order of their write boxes, each made when it is asked for.

    What is held are the groups of each axis: 10^5 tasks are 47 groups on each of three axes. A slice
    is a sequence of the same kind.
    """

    axes: tuple[AxisTasks, AxisTasks, AxisTasks]
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, key: int) -> Task: ...

    @overload
    def __getitem__(self, key: slice) -> Tasks: ...

    def __getitem__(self, key: int | slice) -> Task | Tasks:
        if isinstance(key, slice):
            return Tasks(self.axes, self.indices[key])
        index = self.indices[key]
        z, y, x = self.axes
        row, column = divmod(index, len(x))
        return _task(index, (z[row // len(y)], y[row % len(y)], x[column]))


@dataclass(frozen=True)
class BlockPlan:
    """Every task of one volume and the bytes that the largest of them needs.

    `projected_bytes` counts what the engine allocates in one worker process: one task, the row of
    windows that is read ahead, and `bytes_per_window` times the batch where that was given. `group`
    is the number of chunks, per axis, that a task takes together.
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

    def __str__(self) -> str:
        tasks, size = len(self.tasks), " x ".join(str(n) for n in self.window.shape)
        return (
            f"{tasks:,} task{'' if tasks == 1 else 's'}, {self.windows:,} windows of {size}, "
            f"{self.passes_per_voxel:.2f} passes per voxel, at most {self.projected_bytes / 1e9:.2f} GB"
        )

    @property
    def tasks(self) -> Tasks:
        """The tasks in raster order of their write boxes."""
        sizes = enumerate(zip(self.shape, self.chunk, self.group, strict=True))
        axes = tuple(_axis_tasks(n, c, g, self.window, axis, self.stitch) for axis, (n, c, g) in sizes)
        return Tasks(_three(axes), range(math.prod(len(axis) for axis in axes)))

    @property
    def windows(self) -> int:
        """Windows scored in all; those at the border of two tasks are counted by both."""
        return math.prod(sum(last - first for _, (first, last), *_ in axis) for axis in self.tasks.axes)

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
        write = enumerate(zip(self.shape, (z, *task.write_spans[1:]), strict=True))
        return _task(
            task.index, (axis_task(n, span, self.window, axis, self.stitch) for axis, (n, span) in write)
        )


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
    workers: int = 1,
) -> BlockPlan:
    """Return the plan that finishes first within a memory budget: alone, the one of fewest windows.

    `shape` is the working volume's (zyx), `memory` a number of bytes or a string like "1.5 GB",
    `chunk` the edge of the stored map's chunks in voxels (default: the smallest multiple of the
    window's stride that is at least 96). Without `memory` the engine takes 0.64 GB of buffers beside
    the network's own bytes, or what one column of chunks needs if that is more.

    `workers` processes share the tasks, each with the whole of `memory`. More tasks keep more workers
    busy but score the windows at their borders more than once; so a small volume may stay one task.

    Raises
    ------
    PlanError
        Where not even a task of one column of chunks fits the budget, or an argument makes no sense.
    """
    sizes = _checked(shape, stitch, batch_size, chunk, workers)
    edges = _three(tuple(chunk or s * -(-_CHUNK_EDGE // s) for s in window.stride))
    network = batch_size * (bytes_per_window or 0)
    budget = None if memory is None else parse_memory(memory)
    bare = BlockPlan(sizes, window, stitch, batch_size, tta, edges, (1, 1, 1), 0, budget)

    depth, *section = (-(-n // c) for n, c in zip(sizes, edges, strict=True))
    groups = ([depth] if workers == 1 else _group_sizes(depth), *(_group_sizes(count) for count in section))
    lengths = enumerate(zip(sizes, edges, groups, strict=True))
    cuts = _three(
        tuple([_cut(n, c, g, window, axis, stitch) for g in some] for axis, (n, c, some) in lengths)
    )
    needed = network + _task_bytes(bare, cuts)
    column = int(needed[-1, 0, 0])
    if budget is not None and column > budget:
        raise PlanError(
            f"a task of one column of chunks of {edges} voxels needs {_human(column)} "
            f"({_human(network)} of it for {batch_size} windows of the network)",
            expected=f"at most the memory budget of {_human(budget)}",
            remedy="raise the budget, or lower the batch size",
        )
    limit = max(DEFAULT_BUFFERS + network, column) if budget is None else budget
    windows = [[cut.windows for cut in axis] for axis in cuts]
    busy = min(workers, depth * math.prod(section))  # a worker without a chunk changes nothing
    choice = first_to_finish(windows, needed, limit=limit, workers=busy)
    group = tuple(axis[k].group for axis, k in zip(cuts, choice, strict=True))
    return replace(bare, group=_three(group), projected_bytes=int(needed[choice]))


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


def axis_groups(length: int, chunk: int, group: int) -> list[Span]:
    """Return the write spans on an axis when `group` chunks at a time are taken together."""
    step = chunk * group
    return [(start, min(start + step, length)) for start in range(0, length, step)]


@lru_cache(maxsize=64)
def _axis_tasks(length: int, chunk: int, group: int, window: Window, axis: int, stitch: Stitch) -> AxisTasks:
    """Return what the tasks of an axis write, score, know and read there."""
    return tuple(axis_task(length, span, window, axis, stitch) for span in axis_groups(length, chunk, group))


class _Cut(NamedTuple):
    """An axis cut into groups of chunks: the windows of each group, the largest extents of any."""

    group: int
    windows: tuple[int, ...]
    read: int
    padded: int
    known: int


_Cuts = tuple[list[_Cut], list[_Cut], list[_Cut]]


@lru_cache(maxsize=1024)
def _cut(length: int, chunk: int, group: int, window: Window, axis: int, stitch: Stitch) -> _Cut:
    tasks = [axis_task(length, span, window, axis, stitch) for span in axis_groups(length, chunk, group)]
    windows = tuple(last - first for _, (first, last), *_ in tasks)
    return _Cut(
        group,
        windows,
        read=max(stop - start for *_, (start, stop) in tasks),
        padded=(max(windows) - 1) * window.stride[axis] + window.shape[axis],
        known=max(stop - start for *_, (start, stop), _ in tasks),
    )


def _mesh(cuts: _Cuts, of: Callable[[_Cut], int]) -> list[npt.NDArray[np.int64]]:
    """Return a number of each cut, one array an axis, which combine to every choice of three cuts."""
    return list(np.ix_(*(np.array([of(cut) for cut in axis], dtype=np.int64) for axis in cuts)))


def _task_bytes(plan: BlockPlan, cuts: _Cuts) -> npt.NDArray[np.int64]:
    """Return the bytes that the largest task allocates, the network's own apart, by choice of cuts."""
    depth = plan.window.shape[0]
    _, y, x = _mesh(cuts, lambda cut: cut.padded)
    rows = depth * (_SEEN_BYTES + _MARK_BYTES) * y * x
    # Rows as read stay beside their reflected copy: here the next row of windows is read ahead while
    # this one is scored, and the next task's first row after this task has read its last; never both.
    z, y, x = _mesh(cuts, lambda cut: cut.read)
    rows = rows + np.minimum(z, depth) * (_READ_BYTES + _MARK_BYTES) * y * x
    _, y, x = _mesh(cuts, lambda cut: cut.known)
    # Beside the scores that are being laid together, a copy of the layer that is being stored.
    layer = min(plan.shape[0], plan.chunk[0] + 2 * NEIGHBOURHOOD)
    scores = (_SCORE_BYTES * held_planes(plan) + (_SCORE_BYTES + 1) * layer) * y * x
    # One batch is scored, one collected, one answer delivered, another made; for views, a flipped copy
    # and the sum.
    batches = 4 * plan.window.voxels * (plan.batch_size * (6 if plan.tta else 4) + CACHED_WEIGHTS)
    # One chunk while it is finished: its scores, marks, neighbourhood maxima and the weights scored.
    chunk = math.prod(min(n, c) + 2 * NEIGHBOURHOOD for n, c in zip(plan.shape, plan.chunk, strict=True))
    return rows + scores + (batches + 24 * chunk + CODEC_CONCURRENCY * 2 * _CODEC_CHUNK + _OVERHEAD)


def held_planes(plan: BlockPlan) -> int:
    """Return the planes of scores that a task holds at once: a layer of chunks and what overlaps it.

    A layer is finished when the planes that its peaks look at are complete; the row of windows that
    completes them reaches at most one window beyond.
    """
    return min(plan.shape[0], plan.chunk[0] + 2 * NEIGHBOURHOOD + plan.window.shape[0])


def _group_sizes(count: int) -> list[int]:
    """Return the group sizes that lead to different numbers of groups of `count` chunks."""
    return sorted({-(-count // groups) for groups in range(1, count + 1)})


def _checked(shape: Shape, stitch: Stitch, batch_size: int, chunk: int | None, workers: object) -> Shape:
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
    if not isinstance(workers, int | np.integer) or workers < 1:
        raise PlanError(
            f"{workers!r} workers",
            expected="a whole number of worker processes, at least 1",
            remedy="give 1 where the calling process does the work",
        )
    return _three(sizes)


def _human(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _task(index: int, axes: Iterable[AxisTask]) -> Task:
    write, windows, known, read = zip(*axes, strict=True)
    return Task(index, _three(write), _three(windows), _three(known), _three(read))


def _three(items: tuple[_T, ...]) -> tuple[_T, _T, _T]:
    z, y, x = items
    return (z, y, x)
