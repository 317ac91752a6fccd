"""Stream a tomogram onto the working grid, as a chunked zarr array with its percentiles.

The store is an OME-Zarr 0.5 group: array "0" holds the un-normalised float32 voxels, "fill" says
which of them are fill (only where the tomogram has some), and the attribute `tomocpt_stream` says
what they were made of. Every chunk has one writer and, once it is stored, a receipt; the
percentiles come last, by one atomic put, and a store that has them is finished. Nothing depends on
memory, threads or on how often the work was interrupted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import zarr

from tomocpt_stream.errors import CheckpointError, PlanError
from tomocpt_stream.frame import RULES, Frame, Grid, Rule, working_grid
from tomocpt_stream.ingestion import ATTRIBUTE as ATTRIBUTE
from tomocpt_stream.ingestion import Ingestion
from tomocpt_stream.intake import Intake
from tomocpt_stream.memory import return_freed_memory
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.receipts import (
    as_store,
    claim_group,
    config_hash,
    delete_litter,
    is_absent,
    read_json,
)
from tomocpt_stream.stored import checked
from tomocpt_stream.tiles import CHUNK
from tomocpt_stream.voxels import shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zarr.abc.store import Store

    from tomocpt_stream.frame import Shape
    from tomocpt_stream.receipts import StoreLike
    from tomocpt_stream.tomogram import Tomogram

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Volume:
    """A tomogram on the working grid, stored as chunked zarr; pickled by the address of its store.

    `array` is (z, y, x) float32, un-normalised; `fill` is the bool array of the same shape that says
    which voxels are fill, or None; a chunk that either has lost is a CheckpointError. `voxel_size` and
    `source_voxel_size` are in Å. `percentiles` are p5, p50 and p95 of the working voxels that are not
    fill (rule "tomocpt": of the source voxels).
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
    storage_options: Mapping[str, Any] | None = None,
) -> Volume:
    """Stream a tomogram onto the working grid of `voxel_size` Å in `store`, and return the volume.

    `store` is a path, an address with its `storage_options` (see `remote.connect`; the tomogram has its
    own), or a zarr store. Memory is about 0.3 GB, whatever the size of the tomogram, and
    up to 0.9 GB where its chunks are large (cubes of 256 float32 voxels, four of which are kept).
    A run that was killed goes on where it stopped and ends with the same bytes; a finished store
    is returned at once.

    With a `client` the work is done by its workers, which read the source and write the store for
    themselves, and leave the same bytes: each holds two tiles at a time, so that much memory too. A
    tomogram in memory (`Tomogram.travels` is False) does not leave the calling process, which ingests
    it alone.

    Raises
    ------
    SourceError
        Voxels are NaN or infinite, or so many are equal that p5 = p95.
    CheckpointError
        The store holds something else, or a volume made with other parameters.
    PlanError
        The voxel size or the rule cannot be used, or the workers do not see the store.
    """
    _check_request(voxel_size, rule)
    grid = working_grid(tomogram.shape, tomogram.voxel_size, voxel_size, rule)
    target = as_store(store, storage_options)
    target = target if client is None else shared(target)
    group, attributes = _claim(PatientStore(target), tomogram, grid, rule, voxel_size)
    if "percentiles" in attributes:
        return replace(open_volume(target), name=tomogram.name)
    volume, percentiles = Intake(
        Ingestion(group, tomogram, grid, rule),
        attributes["fingerprint"],
        client if tomogram.travels else None,
        progress,
    ).run()
    values, voxels = volume.facts
    found = {"values": list(values), "voxels": list(voxels)} if values else None
    finished = {**attributes, "percentiles": list(percentiles), "fill": found}
    group.attrs.put({**group.attrs.asdict(), ATTRIBUTE: finished})
    delete_litter(target)
    return_freed_memory()
    return open_volume(target)


def open_volume(store: StoreLike, *, storage_options: Mapping[str, Any] | None = None) -> Volume:
    """Open the finished volume in `store` (a path, an address or a zarr store); no voxel is read.

    `storage_options`, for an address, are those of `remote.connect`.

    Raises
    ------
    CheckpointError
        There is no volume in the store, or it is not finished.
    """
    if not is_absent(store):
        target = as_store(store, storage_options)
        attributes = _attributes(PatientStore(target))
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


def ome_metadata(name: str, grid: Grid, frame: Frame) -> dict[str, Any]:
    """Return the OME-Zarr 0.5 metadata of an array "0" on the working grid, in Å of the source's axes.

    Scale t and translation (t - v) / 2 per axis: the faces of working grid and source coincide. A
    source that is a coarser level of its file lies level_shift level-0 voxels further on.
    """
    source_voxel_size = frame.voxel_size
    spacing = [scale * source_voxel_size for scale in grid.scale]
    if all(math.isclose(t, grid.voxel_size, rel_tol=1e-12) for t in spacing):
        spacing = [grid.voxel_size] * 3  # the same numbers without the rounding of t / v * v
    levels = [shift * frame.file_voxel_size for shift in frame.level_shift]
    shift = [(t - source_voxel_size) / 2 + level for t, level in zip(spacing, levels, strict=True)]
    transformations = [{"type": "scale", "scale": spacing}, {"type": "translation", "translation": shift}]
    axes = [{"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": transformations}]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}


def _check_request(voxel_size: float, rule: str) -> None:
    if not (math.isfinite(voxel_size) and voxel_size > 0):
        raise PlanError(
            f"a working voxel size of {voxel_size} Å",
            expected="a positive number of Å",
            remedy="pass voxel_size=diameter / 20",
        )
    if rule not in RULES:
        raise PlanError(f"rule {rule!r}", expected=f"one of {', '.join(RULES)}", remedy="pass one of these")


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
    attributes = {
        "kind": "volume",
        "config": config,
        "fingerprint": config_hash(config),
        "name": tomogram.name,
        "rule": rule,
        "frame": tomogram.frame.to_json(),
        "grid": grid.to_json(),
    }
    wanted: dict[str, Any] = json.loads(json.dumps(attributes))  # tuples become lists, as they are stored
    there = _attributes(store)
    if there is None:
        ome = ome_metadata(tomogram.name, grid, tomogram.frame)
        claim_group(store, {"ome": ome, ATTRIBUTE: wanted})
        there = _attributes(store) or wanted  # another process may have claimed it first
    differences = _differences(there["config"], wanted["config"])
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
    if ours.get("kind") != "volume":
        raise CheckpointError(
            f"{store} holds zarr data that is not a volume",
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
    asked = PatientStore(store)
    return Volume(
        array=checked(zarr.open_array(asked, path="0", mode="r", zarr_format=3)),
        fill=checked(zarr.open_array(asked, path="fill", mode="r", zarr_format=3))
        if attributes["fill"]
        else None,
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
