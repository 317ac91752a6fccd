"""How a volume is cut into boxes that are read at a time, and the threads that read them ahead.

Nothing here changes a voxel: tiles only decide how often a stored chunk of the source is read, and
how much memory that takes.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.resample import axis_taps, resample_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tomocpt_stream.frame import Box, Grid, Rule, Shape

Floats = npt.NDArray[np.float32]

CHUNK = 64  # edge of a stored chunk of a volume
WORKERS = 2
TILE_BYTES = 64 << 20  # source and working voxels of one tile in one worker
BLOCK_BYTES = 16 << 20  # one block of a pass over all voxels


def plan_tiles(
    grid: Grid, source_shape: Shape, chunks: Shape, rule: Rule, budget: int | None = None
) -> list[Box]:
    """Return the boxes of working voxels, unions of whole chunks, that are read at a time.

    Of all the tilings whose boxes fit the budget (bytes of source and working voxels, `TILE_BYTES`
    when None), the one that reads the fewest source voxels, where a source chunk (`chunks`) that a
    box touches is read whole; of equal ones, the one with the largest boxes. One chunk a tile where
    nothing fits. Every tiling gives the same voxels.
    """
    choices = [_choices(n) for n in grid.shape]
    costs = [
        {edge: _axis_cost(grid, source_shape, chunks, rule, axis, edge) for edge in choices[axis]}
        for axis in range(3)
    ]
    best = (math.inf, 0), (CHUNK, CHUNK, CHUNK)
    for z, y, x in itertools.product(*choices):
        (source_z, cost_z), (source_y, cost_y), (source_x, cost_x) = costs[0][z], costs[1][y], costs[2][x]
        working = math.prod(min(edge, n) for edge, n in zip((z, y, x), grid.shape, strict=True))
        needed = source_z * source_y * source_x + (0 if grid.is_identity else working)
        if 4 * needed <= (budget or TILE_BYTES):
            best = min(best, ((round(cost_z * cost_y * cost_x, 3), -working), (z, y, x)))
    return cut(whole(grid.shape), best[1])


def _choices(length: int) -> list[int]:
    count = math.ceil(length / CHUNK)
    return [
        CHUNK * chunks
        for chunks in sorted({min(count, 1 << power) for power in range(count.bit_length() + 1)})
    ]


def _axis_cost(
    grid: Grid, source_shape: Shape, chunks: Shape, rule: Rule, axis: int, edge: int
) -> tuple[int, float]:
    """Return the longest source span of tiles of `edge`, and source voxels read over those there are."""
    longest, touched, length, chunk = 0, 0, source_shape[axis], chunks[axis]
    for start in range(0, grid.shape[axis], edge):
        span = _span(grid, source_shape, rule, axis, slice(start, min(start + edge, grid.shape[axis])))
        longest = max(longest, span.stop - span.start)
        touched += min(length, math.ceil(span.stop / chunk) * chunk) - span.start // chunk * chunk
    return longest, touched / length


def _span(grid: Grid, source_shape: Shape, rule: Rule, axis: int, side: slice) -> slice:
    return side if grid.is_identity else axis_taps(grid.scale[axis], source_shape[axis], side, rule).span


def planes_at_a_time(grid: Grid, source_shape: Shape, tile: Box, rule: Rule) -> int:
    """Return how many working planes of a tile can be resampled at a time within the budget."""
    depth = int(tile[0].stop - tile[0].start)
    while depth > 1:
        box = (slice(tile[0].start, tile[0].start + depth), tile[1], tile[2])
        if resample_bytes(grid, source_shape, box, rule) <= 1.25 * TILE_BYTES:
            break
        depth //= 2
    return depth


def cut(box: tuple[slice, ...], edges: Shape) -> list[Box]:
    """Return the boxes of `edges` (shorter at the ends) that make up `box`, in lattice order."""
    sides = [
        [slice(start, min(start + edge, side.stop)) for start in range(side.start, side.stop, edge)]
        for side, edge in zip(box, edges, strict=True)
    ]
    return [(z, y, x) for z, y, x in itertools.product(*sides)]


def whole(shape: Shape) -> Box:
    """Return the box of all voxels."""
    return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])


def voxels_of(box: Box) -> int:
    """Return how many voxels a box has."""
    return math.prod(side.stop - side.start for side in box)


def prefetch(read: Callable[[Box], Floats], boxes: Iterable[Box]) -> Iterator[tuple[Box, Floats]]:
    """Yield each box and its voxels; the next ones are being read while one is used."""
    with ThreadPoolExecutor(WORKERS, "read") as pool:
        waiting: deque[tuple[Box, Future[Floats]]] = deque()
        ahead = iter(boxes)
        try:
            while True:
                waiting.extend(
                    (box, pool.submit(read, box)) for box in itertools.islice(ahead, WORKERS - len(waiting))
                )
                if not waiting:
                    return
                box, future = waiting.popleft()
                yield box, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
