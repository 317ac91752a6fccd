"""Stream a tomogram onto the working grid, as a chunked zarr array with its percentiles.

The store is an OME-Zarr 0.5 group: array "0" holds the un-normalised float32 voxels, "fill" says
which of them are fill (only where the tomogram has some), and the attribute `tomocpt_stream` says
what they were made of. Every chunk has one writer and, once it is stored, a receipt; the
percentiles come last, by one atomic put, and a store that has them is finished. Nothing depends on
memory, threads or on how often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec
from zarr.storage import LocalStore

from tomocpt_stream.errors import CheckpointError, PlanError, SourceError
from tomocpt_stream.fill import BOX, Fill, find_fill
from tomocpt_stream.frame import RULES, Frame, Grid, Rule, working_grid
from tomocpt_stream.percentiles import exact_percentiles
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.receipts import Receipts, as_store, config_hash, read_json
from tomocpt_stream.resample import resample_box, resample_mask
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

    from zarr.abc.store import Store
    from zarr.core.array_spec import ArrayConfigParams

    from tomocpt_stream.frame import Box, Shape
    from tomocpt_stream.receipts import StoreLike
    from tomocpt_stream.tomogram import Tomogram

Floats = npt.NDArray[np.float32]

FORMAT_VERSION = 1
ATTRIBUTE = "tomocpt_stream"


@dataclass(frozen=True, eq=False)
class Volume:
    """A tomogram on the working grid, stored as chunked zarr; pickled by the address of its store.

    `array` is (z, y, x) float32, un-normalised; `fill` is the bool array of the same shape that says
    which voxels are fill, or None. `voxel_size` and `source_voxel_size` are in Å. `percentiles` are
    p5, p50 and p95 of the working voxels that are not fill (rule "tomocpt": of the source voxels).
    `remarks` are sentences for the user. `fingerprint` is the hash of all that the voxels follow from.
    """

    array: zarr.Array[Any]
    fill: zarr.Array[Any] | None
    store: Store
    name: str
    frame: Frame
    grid: Grid
    rule: Rule
    percentiles: tuple[float, float, float]
    fill_values: tuple[float, ...]
    remarks: tuple[str, ...]
    fingerprint: str

    @property
    def shape(self) -> Shape:
        """The working shape (z, y, x)."""
        return self.grid.shape

    @property
    def voxel_size(self) -> float:
        """The working voxel size in Å."""
        return self.grid.voxel_size

    @property
    def source_shape(self) -> Shape:
        """The shape (z, y, x) of the tomogram as read."""
        return self.frame.shape

    @property
    def source_voxel_size(self) -> float:
        """The voxel size in Å of the tomogram as read."""
        return self.frame.voxel_size

    def to_dask(self) -> Any:
        """Return the working voxels as a dask array with one block a chunk."""
        import dask.array  # noqa: TID251 - dask is loaded only by who asks for it

        return dask.array.from_array(self.array, chunks=self.array.chunks, name=f"volume-{self.fingerprint}")

    def __reduce__(self) -> tuple[object, ...]:
        return (open_volume, (self.store,))


def ingest(
    tomogram: Tomogram,
    store: StoreLike,
    *,
    voxel_size: float,
    rule: Rule = "bspline",
    client: Any = None,
    progress: Progress = silent,
) -> Volume:
    """Stream a tomogram onto the working grid of `voxel_size` Å in `store`, and return the volume.

    `store` is a path or a zarr store. Memory is about 0.3 GB, whatever the size of the tomogram.
    A run that was killed goes on where it stopped and ends with the same bytes; a finished store
    is returned at once.

    Raises
    ------
    SourceError
        Voxels are NaN or infinite, or so many are equal that p5 = p95.
    CheckpointError
        The store holds something else, or a volume made with other parameters.
    PlanError
        The voxel size, the rule or the client cannot be used.
    """
    _check_request(voxel_size, rule, client)
    started = time.time()
    grid = working_grid(tomogram.shape, tomogram.voxel_size, voxel_size, rule)
    target = as_store(store)
    group, attributes = _claim(target, tomogram, grid, rule, voxel_size)
    if "percentiles" in attributes:
        return open_volume(target)
    source = _Source(tomogram)
    fill = _settle_fill(group, source, rule, progress)
    array = _array(group, "0", grid.shape, "float32")
    filled = None if fill is None else _array(group, "fill", grid.shape, "bool")
    job = _Ingest(source, grid, rule, fill, array, filled, Receipts(target, "volume"))
    job.run(progress)
    percentiles = _statistics(job, progress)
    _sweep(target, started)
    found = None if fill is None else {"values": list(fill.values), "voxels": list(fill.voxels)}
    finished = {**attributes, "percentiles": list(percentiles), "fill": found}
    group.attrs.put({**group.attrs.asdict(), ATTRIBUTE: finished})
    return open_volume(target)


def open_volume(store: StoreLike) -> Volume:
    """Open the finished volume in `store` (a path or a zarr store); no voxel is read.

    Raises
    ------
    CheckpointError
        There is no volume in the store, or it is not finished.
    """
    if not isinstance(store, str | Path) or Path(store).is_dir():
        target = as_store(store)
        attributes = _attributes(target)
        if attributes is not None and "percentiles" in attributes:
            return _volume(target, attributes)
        found = f"{store} holds no volume" if attributes is None else f"the volume in {store} is not finished"
    else:
        found = f"there is no folder {store}"
    raise CheckpointError(
        found,
        expected="a store that `ingest` wrote to its end",
        remedy="run `ingest` with this store; it goes on where it stopped",
    )


def ome_metadata(name: str, grid: Grid, source_voxel_size: float, rule: Rule = "bspline") -> dict[str, Any]:
    """Return the OME-Zarr 0.5 metadata of an array "0" on the working grid, in Å of the source.

    Scale t and translation (t - v) / 2 per axis: the faces of working grid and source coincide.
    """
    uniform = rule == "bspline" or grid.is_identity
    spacing = [grid.voxel_size if uniform else scale * source_voxel_size for scale in grid.scale]
    shift = [(t - source_voxel_size) / 2 for t in spacing]
    transformations = [{"type": "scale", "scale": spacing}, {"type": "translation", "translation": shift}]
    axes = [{"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": transformations}]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}


class _Source:
    """Boxes of a tomogram, one reader at a time, with every voxel checked to be finite."""

    def __init__(self, tomogram: Tomogram) -> None:
        self.tomogram = tomogram
        self.shape = tomogram.shape
        self._lock = threading.Lock()

    def __call__(self, box: Box) -> Floats:
        with self._lock:
            voxels = self.tomogram.read(box)
        if not (np.isfinite(voxels.min()) and np.isfinite(voxels.max())):
            raise self._broken()
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
class _Ingest:
    """What every tile of one run needs."""

    source: _Source
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
        for voxels in drain([self._tile(tile, missing) for tile, missing in tiles]):
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


def _check_request(voxel_size: float, rule: str, client: object) -> None:
    if not (math.isfinite(voxel_size) and voxel_size > 0):
        raise PlanError(
            f"a working voxel size of {voxel_size} Å",
            expected="a positive number of Å",
            remedy="pass voxel_size=diameter / 20",
        )
    if rule not in RULES:
        raise PlanError(f"rule {rule!r}", expected=f"one of {', '.join(RULES)}", remedy="pass one of these")
    if client is not None:
        raise PlanError(
            "a client for ingest",
            expected="client=None: ingest runs in the calling process",
            remedy="leave out the client; only scoring is distributed",
        )


def _claim(
    store: Store, tomogram: Tomogram, grid: Grid, rule: Rule, voxel_size: float
) -> tuple[zarr.Group, dict[str, Any]]:
    """Return the group of this volume and its attributes; refuse a store with anything else."""
    config = {
        "format_version": FORMAT_VERSION,
        "chunk": CHUNK,
        "rule": rule,
        "voxel_size": float(voxel_size),
        "tomogram": tomogram.fingerprint,
    }
    wanted: dict[str, Any] = json.loads(
        json.dumps(
            {
                "config": config,
                "fingerprint": config_hash(config),
                "name": tomogram.name,
                "rule": rule,
                "frame": tomogram.frame.to_json(),
                "grid": grid.to_json(),
            }
        )
    )
    there = _attributes(store)
    if there is None:
        ome = ome_metadata(tomogram.name, grid, tomogram.voxel_size, rule)
        group = zarr.create_group(store, zarr_format=3, attributes={"ome": ome, ATTRIBUTE: wanted})
        return group, wanted
    differences = _differences(there.get("config", {}), wanted["config"])
    if differences:
        raise CheckpointError(
            f"{store} holds a volume made with {'; '.join(differences)}",
            expected="the same parameters in every run on one store",
            remedy="pass another store, or delete this one",
        )
    return zarr.open_group(store, mode="r+", zarr_format=3), there


def _attributes(store: Store) -> dict[str, Any] | None:
    """Return what a store says of its volume; None where the store holds no zarr node at all."""
    found = read_json(store, "zarr.json")
    if found is None and all(read_json(store, key) is None for key in (".zgroup", ".zarray")):
        return None
    ours = {} if found is None else found.get("attributes", {}).get(ATTRIBUTE, {})
    if "config" not in ours or "grid" not in ours:
        raise CheckpointError(
            f"{store} holds zarr data that is not a volume of this package",
            expected="an empty place, or a store that `ingest` wrote",
            remedy="pass another store",
        )
    return dict(ours)


def _differences(there: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Return phrases that name the fields in which two configurations differ."""
    phrases = []
    for key in sorted({*there, *wanted}):
        old, new = there.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            phrases += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            phrases.append(f"{prefix}{key} = {old!r} (now {new!r})")
    return phrases


def _volume(store: Store, attributes: dict[str, Any]) -> Volume:
    fill = attributes["fill"] or {"values": [], "voxels": []}
    frame = Frame.from_json(attributes["frame"])
    share = [voxels / math.prod(frame.shape) for voxels in fill["voxels"]]
    remarks = tuple(
        f"{part:.1%} of the voxels, in regions at the faces, are exactly {value:g}: "
        "taken as fill, left out of the percentiles and not scored where a window is all fill"
        for value, part in zip(fill["values"], share, strict=True)
    )
    p5, p50, p95 = attributes["percentiles"]
    return Volume(
        array=zarr.open_array(store, path="0", mode="r", zarr_format=3),
        fill=zarr.open_array(store, path="fill", mode="r", zarr_format=3) if attributes["fill"] else None,
        store=store,
        name=attributes["name"],
        frame=frame,
        grid=Grid.from_json(attributes["grid"]),
        rule=attributes["rule"],
        percentiles=(p5, p50, p95),
        fill_values=tuple(fill["values"]),
        remarks=remarks,
        fingerprint=attributes["fingerprint"],
    )


def _array(group: zarr.Group, name: str, shape: Shape, dtype: str, edge: int = CHUNK) -> zarr.Array[Any]:
    """Return the array `name` of a volume's group, made where it is not there yet.

    A chunk of voxels that is missing would read as NaN, which no later step takes for a voxel.
    """
    config: ArrayConfigParams = {"write_empty_chunks": True}
    if name in group:
        return zarr.open_array(group.store, path=name, mode="r+", zarr_format=3, config=config)
    return group.create_array(
        name,
        shape=shape,
        chunks=(edge, edge, edge),
        dtype=dtype,
        compressors=BloscCodec(typesize=np.dtype(dtype).itemsize, cname="lz4", clevel=5, shuffle="shuffle"),
        fill_value=math.nan if dtype == "float32" else False,
        dimension_names=("z", "y", "x"),
        config=config,
    )


def _settle_fill(group: zarr.Group, source: _Source, rule: Rule, progress: Progress) -> Fill | None:
    """Return the fill of the source, searched once for a store; None for rule "tomocpt" or without."""
    if rule == "tomocpt":
        return None
    receipts = Receipts(group.store, "fill")
    receipt = receipts.all().get("source")
    if receipt is None:
        found = find_fill(
            source,
            source.shape,
            lambda: _array(group, "source_fill", source.shape, "bool", BOX),
            progress=progress,
        )
        values, voxels = ([], []) if found is None else (list(found.values), list(found.voxels))
        if sum(voxels) == math.prod(source.shape):
            raise _flat(source.tomogram.source, values[0], 1.0)
        receipt = receipts.put("source", {"values": values, "voxels": voxels})
    if not receipt["values"]:
        return None
    mask = _array(group, "source_fill", source.shape, "bool", BOX)
    return Fill(tuple(receipt["values"]), tuple(receipt["voxels"]), mask)


def _statistics(job: _Ingest, progress: Progress) -> tuple[float, ...]:
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


def _sweep(store: Store, started: float) -> None:
    """Delete the temporary files that killed runs left; those of this run's time may be in use."""
    if isinstance(store, LocalStore):
        for path in store.root.rglob("*.partial"):
            if path.stat().st_mtime < started:
                path.unlink(missing_ok=True)
