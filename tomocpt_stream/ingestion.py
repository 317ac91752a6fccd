"""Bring the voxels of a tomogram into the arrays of a volume, tile by tile, and take percentiles.

A tile is read, resampled and cut into chunks by one thread; each chunk is stored, then its receipt.
A later run starts with the chunks that have none. No voxel depends on tiles, threads or runs.
"""

from __future__ import annotations

import hashlib
import math
import threading
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec
from zarr.errors import ContainsArrayError

from tomocpt_stream.errors import CheckpointError, SourceError
from tomocpt_stream.fill import BOX, Fill, find_fill
from tomocpt_stream.frame import Grid, Rule
from tomocpt_stream.percentiles import exact_percentiles
from tomocpt_stream.receipts import Receipts
from tomocpt_stream.resample import resample_box, resample_mask
from tomocpt_stream.stored import checked
from tomocpt_stream.tiles import (
    BLOCK_BYTES,
    CHUNK,
    cut,
    drain,
    plan_tiles,
    planes_at_a_time,
    prefetch,
    slabs,
    voxels_of,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.core.array_spec import ArrayConfigParams

    from tomocpt_stream.frame import Box, Shape
    from tomocpt_stream.progress import Progress
    from tomocpt_stream.tomogram import Tomogram
    from tomocpt_stream.zarrays import Missing

Floats = npt.NDArray[np.float32]


class CheckedSource:
    """Boxes of a tomogram, with every voxel checked to be finite."""

    def __init__(self, tomogram: Tomogram) -> None:
        self.tomogram = tomogram
        self.shape = tomogram.shape
        self._lock = threading.Lock()
        self._error: SourceError | None = None

    def __call__(self, box: Box) -> Floats:
        """Return the voxels of `box`; voxels that are not finite are a SourceError with their count."""
        voxels = self.tomogram.read(box)
        if not (np.isfinite(voxels.min()) and np.isfinite(voxels.max())):
            with self._lock:  # one thread counts for all that come upon broken voxels
                self._error = self._error or self._broken()
            raise self._error
        return voxels

    def _broken(self) -> SourceError:
        count, first = 0, ""
        for box in slabs(self.shape):
            broken = ~np.isfinite(self.tomogram.read(box))
            if broken.any() and not first:
                place = np.argwhere(broken)[0] + [side.start for side in box]
                first = ", ".join(str(index) for index in place.tolist())
            count += int(np.count_nonzero(broken))
        return SourceError(
            f"{self.tomogram.source}: {count} of {math.prod(self.shape)} voxels are NaN or infinite, "
            f"the first at z, y, x = {first}",
            expected="finite voxels",
            remedy="replace them before picking, for instance by the mean of the tomogram",
        )


@dataclass(frozen=True)
class Ingestion:
    """What the tiles of one run share: the source, the arrays that they write, the receipts."""

    source: CheckedSource
    grid: Grid
    rule: Rule
    fill: Fill | None
    array: zarr.Array[Any]
    filled: zarr.Array[Any] | None
    receipts: Receipts

    def run(self, progress: Progress) -> None:
        """Store every chunk that has no receipt yet."""
        done = set(self.receipts.all())
        total = math.prod(self.grid.shape)
        seen = 0
        tiles: list[tuple[Box, list[Box]]] = []
        for tile in plan_tiles(self.grid, self.source.shape, self.source.tomogram.chunks, self.rule):
            chunks = cut(tile, (CHUNK, CHUNK, CHUNK))
            missing = [chunk for chunk in chunks if _key(chunk) not in done]
            seen += sum(voxels_of(chunk) for chunk in chunks if _key(chunk) in done)
            if missing:
                tiles.append((tile, missing))
        progress("ingest", seen, total)
        with closing(drain([self._tile(tile, missing) for tile, missing in tiles])) as finished:
            for voxels in finished:
                seen += voxels
                progress("ingest", seen, total)

    def _tile(self, tile: Box, missing: list[Box]) -> Iterator[int]:
        """Store the missing chunks of a tile; yield the voxels of each when its receipt is put."""
        values = self._resample(tile)
        filled = None if self.fill is None else self._fill_of(self.fill, tile)
        for chunk in missing:
            local = tuple(
                slice(c.start - t.start, c.stop - t.start) for c, t in zip(chunk, tile, strict=True)
            )
            voxels = np.ascontiguousarray(values[local])
            self.array[chunk] = voxels
            if self.filled is not None and filled is not None:
                self.filled[chunk] = filled[local]
            receipt = {"sha256": hashlib.sha256(voxels.data).hexdigest()}
            stored = self.receipts.put(_key(chunk), receipt)
            if stored != receipt:
                raise _unequal(_key(chunk), self.source.tomogram.name)
            yield voxels_of(chunk)

    def _resample(self, tile: Box) -> Floats:
        depth = planes_at_a_time(self.grid, self.source.shape, tile, self.rule)
        if depth >= tile[0].stop - tile[0].start:
            return resample_box(self.source, self.grid, self.source.shape, tile, self.rule)
        out = np.empty([side.stop - side.start for side in tile], np.float32)
        for z in range(tile[0].start, tile[0].stop, depth):
            box = (slice(z, min(z + depth, tile[0].stop)), tile[1], tile[2])
            part = resample_box(self.source, self.grid, self.source.shape, box, self.rule)
            out[z - tile[0].start : box[0].stop - tile[0].start] = part
        return out

    def _fill_of(self, fill: Fill, tile: Box) -> npt.NDArray[np.bool_]:
        return resample_mask(fill.read, self.grid, self.source.shape, tile, self.rule)

    def values(self) -> Iterator[tuple[Box, Floats]]:
        """Yield boxes and the voxels in them that count for the percentiles: all that are not fill."""
        shape = self.source.shape
        if self.rule == "tomocpt":
            grid = Grid(shape, self.source.tomogram.voxel_size, (1.0, 1.0, 1.0))
            return prefetch(
                self.source, plan_tiles(grid, shape, self.source.tomogram.chunks, self.rule, BLOCK_BYTES)
            )
        return prefetch(self._kept, cut(whole(self.grid.shape), (CHUNK, 4 * CHUNK, 4 * CHUNK)))

    def _kept(self, box: Box) -> Floats:
        voxels = np.asarray(self.array[box], dtype=np.float32)
        return voxels if self.filled is None else voxels[~np.asarray(self.filled[box])]


def _key(chunk: Box) -> str:
    return ".".join(str(side.start // CHUNK) for side in chunk)


def settle_fill(group: zarr.Group, source: CheckedSource, rule: Rule, progress: Progress) -> Fill | None:
    """Return the fill of the source, searched once for a store; None for rule "tomocpt" or without."""
    if rule == "tomocpt":
        return None
    receipts = Receipts(group.store, "fill")
    receipt = receipts.all().get("source")
    if receipt is None:
        found = find_fill(
            source,
            source.shape,
            lambda: volume_array(group, "source_fill", source.shape, "bool", BOX, "fill"),
            progress=progress,
        )
        values, voxels = ([], []) if found is None else (list(found.values), list(found.voxels))
        if sum(voxels) == math.prod(source.shape):
            raise SourceError(
                f"{source.tomogram.source}: every voxel is fill, held by whole regions at the faces "
                f"({', '.join(f'{value:g}' for value in values)})",
                expected="voxels of many values",
                remedy="check that this is the reconstruction and not a mask or an empty volume",
            )
        receipt = receipts.put("source", {"values": values, "voxels": voxels})
    if not receipt["values"]:
        return None
    mask = volume_array(group, "source_fill", source.shape, "bool", BOX, "fill")
    return Fill(tuple(receipt["values"]), tuple(receipt["voxels"]), mask)


def settle_percentiles(job: Ingestion, progress: Progress) -> tuple[float, ...]:
    """Return p5, p50, p95 in two passes; equal ones are an error that says how many voxels are equal."""
    seen = 0
    total = 2 * math.prod(job.source.shape if job.rule == "tomocpt" else job.grid.shape)

    def blocks() -> Iterator[Floats]:
        nonlocal seen
        for box, values in job.values():
            yield values
            seen += voxels_of(box)
            progress("statistics", seen, total)

    found = exact_percentiles(blocks)
    if found[0] == found[2]:
        equal = kept = 0
        for _, values in job.values():
            equal += int(np.count_nonzero(values == np.float32(found[0])))
            kept += values.size
        raise _flat(job.source.tomogram.source, found[0], equal / kept)
    return found


def volume_array(
    group: zarr.Group, name: str, shape: Shape, dtype: str, edge: int = CHUNK, missing: Missing = "error"
) -> zarr.Array[Any]:
    """Return the array `name` of a volume's group, made where it is not there yet.

    Reading a chunk that is missing is a CheckpointError, unless `missing` is "fill".
    """
    config: ArrayConfigParams = {"write_empty_chunks": True}
    with suppress(ContainsArrayError):  # of an earlier run, or of one that lays out the same volume now
        made = group.create_array(
            name,
            shape=shape,
            chunks=(edge, edge, edge),
            dtype=dtype,
            compressors=BloscCodec(
                typesize=np.dtype(dtype).itemsize, cname="lz4", clevel=5, shuffle="bitshuffle"
            ),
            fill_value=math.nan if dtype == "float32" else False,
            dimension_names=("z", "y", "x"),
            config=config,
        )
        return checked(made, missing)
    there = zarr.open_array(group.store, path=name, mode="r+", zarr_format=3)
    return checked(there.with_config(config), missing)  # open_array of zarr 3.1 ignores a config


def _flat(source: str, value: float, share: float) -> SourceError:
    return SourceError(
        f"{source}: {share:.1%} of the voxels have the value {value:g}, so that p5 = p95",
        expected="voxels of many values",
        remedy="check that this is the reconstruction and not a mask or an empty volume",
    )


def _unequal(key: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"chunk {key} of {name} came out with other voxels than its receipt says",
        expected="the same voxels from every run",
        remedy="delete the store and run again; the tomogram has changed or the disk is failing",
    )
