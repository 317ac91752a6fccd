"""The stored heat map: its layout in a zarr store, its scores, marks and candidates read again.

A map's store is an OME-Zarr 0.5 group: array "0" holds the scores on the working grid; `marks` says
which voxels were scored and where picks may lie (only where a mask or constant fill left some out);
`candidates/<chunk>` holds the local maxima of each chunk; `receipts/` says which chunks are done. The
attribute `tomocpt_stream` holds everything that the scores depend on. What they do not depend on,
the memory budget and the grouping of chunks into tasks, is not in it: a map that was begun under one
budget goes on under another.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import zarr
from zarr.codecs import BloscCodec
from zarr.errors import ContainsArrayError

from tomocpt_stream.blocks import box_of
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.frame import Frame, Grid
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.peaks import CANDIDATE, MAX_CANDIDATES, flood, order, scan
from tomocpt_stream.receipts import (
    Receipts,
    StoreLike,
    as_store,
    claim_group,
    config_hash,
    holds_objects,
    read_each,
    read_json,
)
from tomocpt_stream.scoring import ALLOWED, RECEIPTS, SCORED
from tomocpt_stream.stored import checked
from tomocpt_stream.volume import ATTRIBUTE, ome_metadata

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from zarr.abc.store import Store

    from tomocpt_stream.blocks import BlockPlan, Span
    from tomocpt_stream.frame import Shape
    from tomocpt_stream.stored import CheckedArray
    from tomocpt_stream.volume import Volume

SEAMS = "candidates/seams"


class Heatmap:
    """A finished map of scores in a store, on the working grid of its volume.

    `array` is a zarr array, float32, zyx; `frame` and `grid` say where its voxels lie in the file.
    """

    def __init__(self, store: Store, attributes: dict[str, Any]) -> None:
        self.store = store
        self._asked = PatientStore(store)
        group = zarr.open_group(self._asked, mode="r")
        self.array: zarr.Array[Any] = member(group, "0")
        self.marks = member(group, "marks") if "marks" in group else None
        self.name = str(attributes["name"])
        self.frame = Frame.from_json(attributes["frame"])
        self.grid = Grid.from_json(attributes["grid"])
        self.config: dict[str, Any] = attributes["config"]
        self.finished: dict[str, Any] = attributes["finished"]
        self._floor = float(attributes["floor"])

    def __reduce__(self) -> tuple[object, ...]:
        return (open_heatmap, (self.store,))

    def __repr__(self) -> str:
        return f"Heatmap({self.name!r}, shape={self.shape}, voxel_size={self.voxel_size:g})"

    @property
    def shape(self) -> Shape:
        """Voxels of the working grid, zyx."""
        return self.grid.shape

    @property
    def voxel_size(self) -> float:
        """The working voxel size in Å."""
        return self.grid.voxel_size

    @property
    def source_shape(self) -> Shape:
        """Voxels of the tomogram as read, zyx."""
        return self.frame.shape

    @property
    def source_voxel_size(self) -> float:
        """The tomogram's voxel size in Å."""
        return self.frame.voxel_size

    @property
    def candidate_floor(self) -> float:
        """The score above which candidates are stored; below it the map is read again."""
        return self._floor

    @property
    def scored_voxels(self) -> int:
        """Voxels to which a scored window contributed; the others are 0."""
        return int(self.finished["scored"])

    @property
    def is_constant(self) -> bool:
        """Whether all scores are equal."""
        return bool(self.finished["minimum"] == self.finished["maximum"])

    def to_dask(self) -> Any:
        """Return the map as a dask array with one block a stored chunk."""
        import dask.array  # noqa: TID251 - dask is loaded only by who asks for it

        # Not of the configuration alone: another device may have scored the same map with other last bits.
        name = config_hash({"store": str(self.store), "config": self.config, "finished": self.finished})
        return dask.array.from_array(self.array, chunks=self.array.chunks, name=f"heatmap-{name}")

    def candidates(self) -> pd.DataFrame:
        """Return the stored local maxima, best first: z, y, x (working voxels), score, dz, dy, dx.

        dz, dy and dx lead from the voxel to the refined top.
        """
        return pd.DataFrame(self.candidate_table())

    def candidate_table(self) -> npt.NDArray[np.void]:
        """Return the candidates above `candidate_floor` as a structured array, best first."""
        if self.is_constant:
            return np.zeros(0, dtype=CANDIDATE)
        tables, names = [], [SEAMS]
        for key, receipt in Receipts(self._asked, RECEIPTS).each():
            # A table of none is not read; in maps of before the tables had a name their chunks' key was it.
            names += [receipt.get("table", f"candidates/{key}")] if receipt["candidates"] else []
            if receipt["constant"] and receipt["maximum"] > self.candidate_floor:
                box = box_of(receipt["settled"])
                tables.append(self._allowed(scan(self.array, box, self.candidate_floor, name=self.name)))
        tables += [self._table(name, data) for name, data in read_each(self._asked, names)]
        table = np.concatenate(tables)
        if len(table) != self.finished["candidates"]:
            raise CheckpointError(
                f"the map of {self.name} holds {len(table)} of its {self.finished['candidates']} candidates",
                expected="every object that was stored",
                remedy="delete the store and predict again",
            )
        return order(table, self.shape)

    def scan(self, threshold: float) -> npt.NDArray[np.void]:
        """Return the local maxima above any threshold by reading the map again, best first.

        Of a constant map these are all voxels; `find_peaks` takes none of them.
        """
        tables, count = [], 0
        for spans in pieces(tuple((0, n) for n in self.shape), self.array.chunks):
            tables.append(self._allowed(scan(self.array, box_of(spans), threshold, name=self.name)))
            count += len(tables[-1])
            if count > MAX_CANDIDATES:
                raise flood(self.name, count)
        return order(np.concatenate(tables), self.shape)

    def _table(self, key: str, data: bytes | None) -> npt.NDArray[np.void]:
        if data is None or len(data) % CANDIDATE.itemsize:
            raise CheckpointError(
                f"the map of {self.name} lacks the object {key}, or has a part of it",
                expected="every object that its receipts name",
                remedy="delete the store and predict again",
            )
        return np.frombuffer(data, dtype=CANDIDATE)

    def _allowed(self, found: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        return found if self.marks is None else allowed_ones(found, self.marks)


def open_heatmap(store: StoreLike, *, storage_options: Mapping[str, Any] | None = None) -> Heatmap:
    """Open the finished map in `store` (a path, an address or a zarr store); no score is read.

    `storage_options`, for an address, are those of `remote.connect`.

    Raises
    ------
    CheckpointError
        There is no map in the store, or it is not finished.
    """
    target = as_store(store, storage_options)
    attributes = _attributes(PatientStore(target))
    if attributes is None or "finished" not in attributes:
        state = "holds no heat map" if attributes is None else "holds a heat map that is not finished"
        raise CheckpointError(
            f"{store} {state}",
            expected="a store that `predict` wrote to its end",
            remedy="run `predict` with this store; it goes on where it stopped",
        )
    return Heatmap(target, attributes)


def allowed_ones(found: npt.NDArray[np.void], marks: zarr.Array[Any]) -> npt.NDArray[np.void]:
    """Return the candidates that lie in voxels that were scored and where picks are allowed."""
    if not len(found):
        return found
    points = tuple(np.asarray(found[axis], dtype=np.intp) for axis in "zyx")
    there = np.asarray(marks.get_coordinate_selection(points))
    allowed: npt.NDArray[np.void] = found[there == SCORED | ALLOWED]
    return allowed


def claim_store(
    store: Store, volume: Volume, plan: BlockPlan, config: dict[str, Any], *, floor: float
) -> dict[str, Any]:
    """Lay out an empty store, or return the attributes of one laid out for the same map.

    The attributes come with the group, the arrays after it: a store that was claimed can be taken up
    wherever its claimant was killed. `floor`, above which candidates are kept, is the first run's.
    """
    attributes = {
        "kind": "heatmap",
        "name": volume.name,
        "frame": volume.frame.to_json(),
        "grid": volume.grid.to_json(),
        "config": config,
        "hash": config_hash(config),
        "floor": float(floor),
    }
    wanted: dict[str, Any] = json.loads(json.dumps(attributes))  # tuples become lists, as they are stored
    there = _attributes(store)
    if there is None:
        ome = ome_metadata(volume.name, volume.grid, volume.frame)
        claim_group(store, {"ome": ome, ATTRIBUTE: wanted})
        there = _attributes(store) or wanted  # another process may have claimed it first
    theirs, ours = there["config"], wanted["config"]
    differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    if differing:
        raise CheckpointError(
            f"the store holds a heat map of {there['name']} with another {', '.join(differing)}",
            expected="an empty store, or one of the same map",
            remedy="give another store, or delete this one",
        )
    group = zarr.open_group(store, mode="r+", zarr_format=3)
    _create(group, "0", plan, "float32", np.nan)  # a chunk that is lost is read as NaN, never as zeros
    if config["mask"] is not None or volume.fill is not None:
        _create(group, "marks", plan, "uint8", 0)
    return there


def _create(group: zarr.Group, name: str, plan: BlockPlan, dtype: str, fill_value: float) -> None:
    with suppress(ContainsArrayError):  # of an earlier run, or of one that lays out the same map now
        group.create_array(
            name,
            shape=plan.shape,
            chunks=plan.chunk,
            dtype=dtype,
            fill_value=fill_value,
            compressors=BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
            dimension_names=("z", "y", "x"),
            config={"write_empty_chunks": True},
        )


def _attributes(store: Store) -> dict[str, Any] | None:
    """Return what a store says of its map; None where it holds nothing at all.

    Raises CheckpointError for a store of something else: nothing in it may be touched.
    """
    found = read_json(store, "zarr.json")
    if found is None:
        if not holds_objects(store):
            return None
        found = read_json(store, "zarr.json")  # what it holds may have come since, from another claimant
    ours = {} if found is None else found.get("attributes", {}).get(ATTRIBUTE, {})
    if ours.get("kind") != "heatmap":
        raise CheckpointError(
            f"{store} holds something that is not a heat map",
            expected="an empty store, or one that `predict` wrote",
            remedy="give another store; nothing in this one was touched",
        )
    return dict(ours)


def member(group: zarr.Group, name: str) -> CheckedArray:
    """Return an array of a map's group, ready to be written; a chunk that is lost is an error.

    zarr 3.1 forgets with a reopened array that empty chunks are to be written.
    """
    array: object = None
    with suppress(KeyError, ValueError):  # it is not there, or its metadata are no JSON
        array = group[name]
    if not isinstance(array, zarr.Array):
        raise CheckpointError(
            f"{group.store} has no array {name!r} that can be opened",
            expected="what `predict` laid out",
            remedy="delete this store and predict again",
        )
    return checked(array.with_config({"write_empty_chunks": True}))


def pieces(spans: Iterable[Span], size: Sequence[int]) -> Iterator[tuple[Span, Span, Span]]:
    """Yield a box cut into boxes of at most `size`, in raster order."""
    axes = [
        [(start, min(start + step, stop)) for start in range(first, stop, step)]
        for (first, stop), step in zip(spans, size, strict=True)
    ]
    for piece in product(*axes):
        yield as_spans(piece)


def as_spans(spans: Iterable[Sequence[int]]) -> tuple[Span, Span, Span]:
    """Return three spans of ints from JSON or from any three pairs."""
    z, y, x = ((int(start), int(stop)) for start, stop in spans)
    return (z, y, x)
