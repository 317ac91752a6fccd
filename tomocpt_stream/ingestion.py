"""Bring the voxels of a tomogram into the arrays of a volume: what one process does for one job.

A job is a tile, or the search for fill. A tile is read, resampled and cut into chunks; each chunk is
stored, then its receipt. A later run starts with the chunks that have none. No voxel depends on tiles,
threads, processes or runs.
"""

from __future__ import annotations

import hashlib
import math
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec
from zarr.errors import ContainsArrayError

from tomocpt_stream.circumstances import circumstances
from tomocpt_stream.decoded import DECODED
from tomocpt_stream.errors import BrokenSourceError, DuplicateError, PlanError
from tomocpt_stream.fill import BOX, Fill, find_fill
from tomocpt_stream.memory import return_freed_memory
from tomocpt_stream.receipts import Receipts, read_json
from tomocpt_stream.resample import resample_box, resample_mask
from tomocpt_stream.stored import checked
from tomocpt_stream.tiles import CHUNK, cut, planes_at_a_time, voxels_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zarr.abc.store import Store
    from zarr.core.array_spec import ArrayConfigParams

    from tomocpt_stream.frame import Box, Grid, Rule, Shape
    from tomocpt_stream.stages import Report
    from tomocpt_stream.tomogram import Tomogram
    from tomocpt_stream.traffic import Traffic
    from tomocpt_stream.zarrays import Missing

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

FillFacts = tuple[tuple[float, ...], tuple[int, ...]]
"""The values that are fill, and how many source voxels each has."""

ATTRIBUTE = "tomocpt_stream"
"""Where the metadata of a store say what it is."""

NO_FILL: FillFacts = (), ()
CHUNKS: Shape = (CHUNK, CHUNK, CHUNK)

TOLERANCE = 1e-5
"""How far voxels of two kinds of machine may differ, as a share of the range of their chunk."""


class NotFiniteError(BrokenSourceError):
    """Voxels that are NaN or infinite, met by a job; how many there are is counted once, by others."""


class CheckedSource:
    """Boxes of a tomogram, with every voxel checked to be finite; `bytes_read` counts what was read.

    `read` may be called from several threads.
    """

    def __init__(self, tomogram: Tomogram) -> None:
        self.bytes_read = 0
        self._tomogram = tomogram
        self._lock = threading.Lock()

    def read(self, box: Box) -> Floats:
        """Return the voxels of `box`; one that is not finite is a NotFiniteError."""
        voxels = self._tomogram.read(box)
        with self._lock:
            self.bytes_read += voxels.size * self._tomogram.dtype.itemsize
        if not (np.isfinite(voxels.min()) and np.isfinite(voxels.max())):
            raise NotFiniteError(
                f"{self._tomogram.source} has voxels that are NaN or infinite",
                expected="finite voxels",
                remedy="replace them before picking, for instance by the mean of the tomogram",
            )
        return voxels


class Ingestion:
    """The source and the arrays of one volume, open in one process; its threads share it.

    `facts` are what the search for fill found, nothing as long as it has not ended. `array` are the
    working voxels; `filled` says which of them are fill, None where there is none.
    """

    def __init__(
        self, group: zarr.Group, tomogram: Tomogram, grid: Grid, rule: Rule, facts: FillFacts = NO_FILL
    ) -> None:
        self.group = group
        self.tomogram = tomogram
        self.grid = grid
        self.rule = rule
        self.facts = facts
        self.receipts = Receipts(group.store, "volume")
        self.array = volume_array(group, "0", grid.shape, "float32")
        values, voxels = facts
        self.fill = Fill(values, voxels, source_fill(group, tomogram.shape)) if values else None
        self.filled = volume_array(group, "fill", grid.shape, "bool") if values else None

    def resample(self, source: CheckedSource, box: Box) -> Floats:
        """Return the working voxels of a box within the memory of a tile."""
        shape = self.tomogram.shape
        depth = planes_at_a_time(self.grid, shape, box, self.rule)
        if depth >= box[0].stop - box[0].start:
            return resample_box(source.read, self.grid, shape, box, self.rule)
        z, y, x = (side.stop - side.start for side in box)
        out = np.empty((z, y, x), np.float32)
        for part in cut(box, (depth, y, x)):
            planes = slice(part[0].start - box[0].start, part[0].stop - box[0].start)
            out[planes] = resample_box(source.read, self.grid, shape, part, self.rule)
        return out

    def resample_fill(self, box: Box) -> Bools | None:
        """Return which working voxels of a box are fill; None where there is none anywhere."""
        if self.fill is None:
            return None
        return resample_mask(self.fill.read, self.grid, self.tomogram.shape, box, self.rule)

    def kept(self, box: Box) -> Floats:
        """Return the stored voxels of a box that are not fill, in one row where there is fill."""
        voxels = np.asarray(self.array[box], dtype=np.float32)
        return voxels if self.filled is None else voxels[~np.asarray(self.filled[box])]

    def store(self, chunk: Box, voxels: Floats, filled: Bools | None) -> None:
        """Store a whole chunk, then its receipt; where it has one, compare, for the first stays."""
        voxels, key = np.ascontiguousarray(voxels), key_of(chunk)
        facts = {"sha256": hashlib.sha256(voxels.data).hexdigest()}
        new = self.receipts.get(key) is None
        if new:
            self.array[chunk] = voxels
        if self.filled is not None and filled is not None:
            filled = np.ascontiguousarray(filled)
            facts["fill_sha256"] = hashlib.sha256(filled.data).hexdigest()
            if new:
                self.filled[chunk] = filled

        def agree(sha256: str) -> bool:
            there = np.ascontiguousarray(self.array[chunk], dtype=np.float32)
            same = hashlib.sha256(there.data).hexdigest() == sha256
            return same and bool(np.abs(there - voxels).max() <= TOLERANCE * float(np.ptp(there)))

        put_facts(self.receipts, key, facts, f"chunk {key} of {self.tomogram.name}", agree)


@dataclass(frozen=True)
class IngestionAddress:
    """Where the source and the arrays of a volume lie, for any process that sees both.

    `run` tells one ingestion from others, `token` one state of what is known of its fill.
    """

    store: Store
    tomogram: Tomogram
    grid: Grid
    rule: Rule
    facts: FillFacts
    fingerprint: str
    run: str
    token: str

    def open(self) -> Ingestion:
        """Open them; a process that does not see the very same ones raises a PlanError or SourceError."""
        found: dict[str, Any] = {}
        with suppress(FileNotFoundError):  # a folder that is opened for writing would be made
            found = read_json(self.store.with_read_only(read_only=True), "zarr.json") or {}
        if found.get("attributes", {}).get(ATTRIBUTE, {}).get("fingerprint") != self.fingerprint:
            raise PlanError(
                f"{socket.gethostname()} does not find the volume that is being made in {self.store}",
                expected="a store that all workers see under the same address",
                remedy="give a folder on a file system, or the store of a bucket, that all machines share",
            )
        tomogram = _SOURCES.setdefault(self.run, self.tomogram)
        tomogram.confirm()
        group = zarr.open_group(self.store, mode="r+", zarr_format=3)
        return Ingestion(group, tomogram, self.grid, self.rule, self.facts)


_SOURCES: WeakValueDictionary[str, Tomogram] = WeakValueDictionary()
"""The sources that are open in this process, by run: what was fetched for one stage is there for the next."""


def with_traffic(
    function: Callable[[Any, Ingestion, Report], Any], payload: Any, volume: Ingestion, report: Report
) -> tuple[Any, Traffic | None]:
    """Do a job; return its answer, and what this process has asked a remote source for and not yet told.

    What a job that fails has asked for is told by the next one.
    """
    answer, traffic = function(payload, volume, report), volume.tomogram.traffic
    return answer, None if traffic is None else traffic.take()


def store_tile(task: tuple[Box, int], volume: Ingestion, report: Report) -> None:
    """Store those chunks of a tile that have no receipt; report the voxels that have one now as done.

    `task` is the tile, a union of whole chunks, and how many of its voxels are counted as done already.
    Memory: 64 MB of voxels and what reading and storing them allocates, about 110 MB; 280 MB where the
    chunks of the source are large.
    """
    tile, counted = task
    DECODED.keep()
    began, source = time.monotonic(), CheckedSource(volume.tomogram)
    chunks = {key_of(chunk): chunk for chunk in cut(tile, CHUNKS)}
    present = volume.receipts.present(list(chunks))  # another run may have stored some of them meanwhile
    missing = [chunk for key, chunk in chunks.items() if key not in present]
    stored = 0

    def tell() -> None:
        left = sum(voxels_of(chunk) for chunk in missing) - stored
        report(
            {
                "done": voxels_of(tile) - left - counted,
                "voxels": stored,
                "bytes_read": source.bytes_read,
                "seconds": time.monotonic() - began,
            }
        )

    tell()
    if missing:
        box = _around(missing)
        values, filled = volume.resample(source, box), volume.resample_fill(box)
        for chunk in missing:
            z, y, x = (slice(c.start - b.start, c.stop - b.start) for c, b in zip(chunk, box, strict=True))
            volume.store(chunk, values[z, y, x], None if filled is None else filled[z, y, x])
            stored += voxels_of(chunk)
            tell()
        del values, filled
        return_freed_memory()


def search_fill(_: None, volume: Ingestion, report: Report) -> FillFacts:
    """Find the fill of the source, store where it is, then the receipt of what it is; return this."""
    receipts = Receipts(volume.group.store, "fill")
    DECODED.keep()
    shape, began = volume.tomogram.shape, time.monotonic()
    source = CheckedSource(volume.tomogram)
    seen = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal seen
        del stage, total
        seen = done
        tell(done)

    def tell(done: int) -> None:
        seconds = time.monotonic() - began
        report({"done": done, "voxels": seen, "bytes_read": source.bytes_read, "seconds": seconds})

    facts = receipts.get("source")
    if facts is None:
        found = find_fill(source.read, shape, lambda: source_fill(volume.group, shape), progress=progress)
        values, voxels = ((), ()) if found is None else (found.values, found.voxels)
        if sum(voxels) == math.prod(shape):
            raise BrokenSourceError(
                f"{volume.tomogram.source}: every voxel is fill, held by whole regions at the faces "
                f"({', '.join(f'{value:g}' for value in values)})",
                expected="voxels of many values",
                remedy="check that this is the reconstruction and not a mask or an empty volume",
            )
        facts = {"values": list(values), "voxels": list(voxels)}
        put_facts(receipts, "source", facts, f"the fill of {volume.tomogram.name}")
        return_freed_memory()
    tell(math.prod(shape))  # without values to look for, or by another run, not every voxel was seen here
    return tuple(facts["values"]), tuple(facts["voxels"])


def source_fill(group: zarr.Group, shape: Shape) -> zarr.Array[Any]:
    """Return the array that says which source voxels are fill; chunks without any are absent."""
    return volume_array(group, "source_fill", shape, "bool", BOX, "fill")


def put_facts(
    receipts: Receipts,
    key: str,
    facts: Mapping[str, Any],
    what: str,
    agree: Callable[[str], bool] = lambda _: False,
) -> None:
    """Put a receipt of facts, beside which it says who made them; other facts there are an error.

    Unless they are of a machine of another kind, and `agree`, called with the sha256 of the receipt
    that is there, says that voxels which are stored under it differ from these by rounding only.
    """
    ours = {**facts, **circumstances()}
    stored = receipts.put(key, ours)
    if any(stored.get(name) != fact for name, fact in facts.items()):
        if stored.get("machine") != ours["machine"] and agree(str(stored.get("sha256"))):
            return
        raise DuplicateError(
            f"{what} came out with other voxels than its receipt says, of {stored.get('worker')} "
            f"on {stored.get('machine')}",
            expected="the same voxels from every run",
            remedy="delete the store and run again; the tomogram has changed or a disk is failing",
        )


def key_of(chunk: Box) -> str:
    """Return the key of a chunk's receipt."""
    return ".".join(str(side.start // CHUNK) for side in chunk)


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


def _around(boxes: list[Box]) -> Box:
    z, y, x = (
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )
    return z, y, x
