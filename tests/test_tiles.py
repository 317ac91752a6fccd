"""Tiles cover a volume once, fit their budget and read the source little; threads lose nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tomocpt_stream import tiles
from tomocpt_stream.frame import working_grid
from tomocpt_stream.resample import resample_bytes, source_box
from tomocpt_stream.tiles import CHUNK, cut, plan_tiles, planes_at_a_time, prefetch, voxels_of

if TYPE_CHECKING:
    from tomocpt_stream.frame import Box, Shape

Floats = npt.NDArray[np.float32]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 400)] * 3),
    chunks=st.tuples(*[st.integers(1, 400)] * 3),
    ratio=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    budget=st.integers(1 << 20, 64 << 20),
)
def test_tiles_are_whole_chunks_that_cover_the_grid_once(
    shape: Shape, chunks: Shape, ratio: float, budget: int
) -> None:
    grid = working_grid(shape, 10.0, 10.0 * ratio)
    found = plan_tiles(grid, shape, chunks, "bspline", budget)
    count = np.zeros([-(-n // CHUNK) for n in grid.shape], int)
    for tile in found:
        assert all(
            side.start % CHUNK == 0 and (side.stop % CHUNK == 0 or side.stop == n)
            for side, n in zip(tile, grid.shape, strict=True)
        )
        count[tuple(slice(side.start // CHUNK, -(-side.stop // CHUNK)) for side in tile)] += 1
    assert count.min() == count.max() == 1
    needed = max(
        4 * (voxels_of(source_box(grid, shape, tile)) + (0 if grid.is_identity else voxels_of(tile)))
        for tile in found
    )
    one_chunk = all(side.stop - side.start <= CHUNK for tile in found for side in tile)
    assert needed <= budget or one_chunk


def read_over_needed(found: list[Box], shape: Shape, chunks: Shape) -> float:
    """Source voxels of all chunks that tiles of an identity grid touch, over those there are."""
    touched = 0
    for tile in found:
        touched += np.prod(
            [
                min(n, -(-side.stop // c) * c) - side.start // c * c
                for side, n, c in zip(tile, shape, chunks, strict=True)
            ]
        )
    return float(touched / np.prod(shape))


def test_tiles_follow_the_chunks_of_the_source() -> None:
    shape = (512, 1024, 1024)
    grid = working_grid(shape, 10.0, 10.0)
    for chunks in [(128, 128, 128), (64, 256, 256), (512, 64, 64), (256, 256, 256)]:
        assert read_over_needed(plan_tiles(grid, shape, chunks, "bspline"), shape, chunks) == 1.0
    planes = plan_tiles(grid, shape, (8, 1024, 1024), "bspline")
    assert {(tile[1].stop - tile[1].start, tile[2].stop - tile[2].start) for tile in planes} == {(256, 1024)}


def test_a_tile_too_large_for_the_budget_is_resampled_in_parts() -> None:
    shape = (900, 900, 900)
    grid = working_grid(shape, 10.0, 120.0)
    (tile,) = plan_tiles(grid, shape, (1, 900, 900), "bspline")[:1]
    depth = planes_at_a_time(grid, shape, tile, "bspline")
    assert 1 <= depth < 64
    part = (slice(0, depth), *tile[1:])
    assert resample_bytes(grid, shape, part) <= 1.25 * tiles.TILE_BYTES
    small = working_grid((64, 64, 64), 10.0, 10.0)
    assert planes_at_a_time(small, (64, 64, 64), cut(tile, (64, 64, 64))[0], "bspline") == 64


def test_prefetch_keeps_the_order_and_reads_little_ahead() -> None:
    boxes = cut((slice(0, 40), slice(0, 1), slice(0, 1)), (1, 1, 1))
    read: list[int] = []

    def take(box: Box) -> Floats:
        read.append(box[0].start)
        return np.full((1, 1, 1), box[0].start, np.float32)

    for used, (box, values) in enumerate(prefetch(take, boxes)):
        assert values[0, 0, 0] == box[0].start == used
        assert len(read) <= used + tiles.WORKERS
    assert sorted(read) == list(range(40))


def test_prefetch_raises_what_reading_raised() -> None:
    def take(box: Box) -> Floats:
        if box[0].start == 3:
            raise OSError("disk")
        return np.zeros((1, 1, 1), np.float32)

    boxes = cut((slice(0, 9), slice(0, 1), slice(0, 1)), (1, 1, 1))
    with pytest.raises(OSError, match="disk"):
        list(prefetch(take, boxes))
