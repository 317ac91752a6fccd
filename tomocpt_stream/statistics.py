"""Percentiles of a volume, and how many of its voxels are broken, counted in jobs that add up.

A job counts some blocks of voxels and answers with integers, a few kB packed; their sum does not
depend on how the blocks were shared out.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.decoded import DECODED
from tomocpt_stream.frame import Grid
from tomocpt_stream.ingestion import CheckedSource
from tomocpt_stream.percentiles import count_lower, count_upper, pack
from tomocpt_stream.tiles import BLOCK_BYTES, CHUNK, cut, plan_tiles, voxels_of, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tomocpt_stream.frame import Box
    from tomocpt_stream.ingestion import Ingestion
    from tomocpt_stream.stages import Report

Floats = npt.NDArray[np.float32]

Blocks = tuple["Box", ...]
"""The boxes that one job counts."""

TOGETHER = 8  # blocks of one job: 128 MB of voxels, read 16 MB at a time


def measured_blocks(volume: Ingestion) -> list[Blocks]:
    """Return the boxes of the voxels that the percentiles are taken of, those of each job together.

    They are boxes of the working grid, by the rule "tomocpt" of the source.
    """
    if volume.rule == "tomocpt":
        return source_blocks(volume)
    return _together(cut(whole(volume.grid.shape), (CHUNK, 4 * CHUNK, 4 * CHUNK)))


def source_blocks(volume: Ingestion) -> list[Blocks]:
    """Return boxes that make up the source, those of each job together."""
    source = volume.tomogram
    grid = Grid(source.shape, source.voxel_size, (1.0, 1.0, 1.0))
    return _together(plan_tiles(grid, source.shape, source.chunks, volume.rule, BLOCK_BYTES))


def count_upper_halves(blocks: Blocks, volume: Ingestion, report: Report) -> bytes:
    """Return the packed counts of the upper halves of the voxels in blocks."""
    if volume.rule != "tomocpt":
        DECODED.forget()  # the source has been read
    return pack(count_upper(_measured(blocks, volume, report)))


def count_lower_halves(task: tuple[Blocks, tuple[int, ...]], volume: Ingestion, report: Report) -> bytes:
    """Return the packed counts of the lower halves of the voxels in blocks; `task` has the upper ones."""
    blocks, bins = task
    return pack(count_lower(_measured(blocks, volume, report), bins))


def count_broken(blocks: Blocks, volume: Ingestion, report: Report) -> tuple[int, int]:
    """Return how many source voxels in blocks are NaN or infinite, and the raster index of the first."""
    source, count, first = volume.tomogram, 0, math.prod(volume.tomogram.shape)
    tell = _teller(report)
    for box in blocks:
        broken = ~np.isfinite(source.read(box))
        if broken.any():
            count += int(np.count_nonzero(broken))
            z, y, x = (
                int(index) + side.start
                for index, side in zip(np.unravel_index(broken.argmax(), broken.shape), box, strict=True)
            )
            first = min(first, (z * source.shape[1] + y) * source.shape[2] + x)
        tell(voxels_of(box), voxels_of(box) * source.dtype.itemsize)
    return count, first


def _measured(blocks: Blocks, volume: Ingestion, report: Report) -> Iterator[Floats]:
    """Yield the voxels in blocks that count for the percentiles: all that are not fill."""
    source = CheckedSource(volume.tomogram)
    of_source = volume.rule == "tomocpt"
    read, size = (source.read, volume.tomogram.dtype.itemsize) if of_source else (volume.kept, 4)
    tell = _teller(report)
    for box in blocks:
        yield read(box)
        tell(voxels_of(box), size * voxels_of(box))


def _teller(report: Report) -> Callable[[int, int], None]:
    """Return what reports further voxels and bytes that were read."""
    began, done, read = time.monotonic(), 0, 0

    def tell(voxels: int, size: int) -> None:
        nonlocal done, read
        done, read = done + voxels, read + size
        report({"done": done, "voxels": done, "bytes_read": read, "seconds": time.monotonic() - began})

    return tell


def _together(boxes: list[Box]) -> list[Blocks]:
    return [tuple(boxes[start : start + TOGETHER]) for start in range(0, len(boxes), TOGETHER)]
