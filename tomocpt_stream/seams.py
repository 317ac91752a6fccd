"""Which voxels of a map are still to be searched for peaks when all tasks are done.

A task searches every voxel whose neighbourhood it holds. What is left, where anything is, lies at the
borders of tasks; it is searched in the stored map.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.scoremap import as_spans, pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tomocpt_stream.blocks import BlockPlan, Span


def unsettled(chunks: npt.NDArray[np.int32], plan: BlockPlan) -> Iterator[tuple[Span, Span, Span]]:
    """Yield boxes of the voxels whose neighbourhood left the block that their task held.

    `chunks` holds for each chunk of the map three boxes, shape (chunks, 3, axis, start or stop): what
    its task wrote, the chunk itself, and the part of it that is settled. The chunks of one task are
    taken together where all of them come from it: what is left is then the shell of its write box.
    """
    by_task = chunks[np.lexsort(chunks[:, 0].reshape(len(chunks), 6).T)]
    for _, group in itertools.groupby(by_task, lambda boxes: boxes[0].tobytes()):
        members = np.stack(list(group))
        write, joined = as_spans(members[0, 0]), _joined(members[:, 2])
        if joined is not None and len(members) == sum(1 for _ in plan.chunks_of(write)):
            pairs = [(write, joined)]
        else:
            pairs = [(as_spans(chunk), as_spans(settled)) for _, chunk, settled in members]
        for outer, inner in pairs:
            for shell in without(outer, inner):
                yield from pieces(shell, tuple(2 * c for c in plan.chunk))


def _joined(boxes: npt.NDArray[np.int32]) -> tuple[Span, Span, Span] | None:
    """Return the box that boxes without a common voxel make up; None where they make up none."""
    sizes = (boxes[..., 1].astype(np.int64) - boxes[..., 0]).clip(0).prod(axis=1)
    # An empty span lies where its chunk begins, not where the settled voxels of others end.
    some = boxes[sizes > 0]
    if not len(some):
        return ((0, 0), (0, 0), (0, 0))
    low, high = some[..., 0].min(axis=0), some[..., 1].max(axis=0)
    whole = (high.astype(np.int64) - low).prod() == sizes.sum()
    return as_spans(np.stack([low, high], axis=1)) if whole else None


def without(
    outer: tuple[Span, Span, Span], inner: tuple[Span, Span, Span]
) -> Iterator[tuple[Span, Span, Span]]:
    """Yield up to six boxes that make up `outer` without `inner`."""
    rest = list(outer)
    for axis in range(3):
        (start, stop), (low, high) = rest[axis], inner[axis]
        low, high = min(max(start, low), stop), max(start, min(high, stop))
        for span in ((start, low), (max(low, high), stop)):
            if span[0] < span[1]:
                yield as_spans([*rest[:axis], span, *rest[axis + 1 :]])
        rest[axis] = (low, max(low, high))
        if rest[axis][0] == rest[axis][1]:
            return
