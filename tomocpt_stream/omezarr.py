"""Zarr arrays and OME-Zarr groups, format 2 and 3: which array is read, and where it lies.

Arrays are opened one by one with the format that their metadata names, never by probing a group.
OME-Zarr metadata of versions 0.4 and 0.5 is read (https://ngff.openmicroscopy.org/0.5/).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync

from tomocpt_stream.errors import SourceError
from tomocpt_stream.receipts import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zarr.abc.store import Store

    from tomocpt_stream.frame import Box, Shape

Triple = tuple[float, float, float]
Missing = Literal["error", "fill"]

ANGSTROM = {
    "picometer": 0.01,
    "angstrom": 1.0,
    "nanometer": 10.0,
    "micrometer": 1e4,
    "millimeter": 1e7,
    "meter": 1e10,
}


@dataclass(frozen=True)
class Place:
    """Where the array that is read lies in its file; all z, y, x.

    `file_shape` and `voxel_sizes` (Å, None where the file states none) are those of level 0. Index
    i of the array is index `i * scale + shift` of level 0.
    """

    file_shape: Shape
    voxel_sizes: Triple | None = None
    scale: Triple = (1.0, 1.0, 1.0)
    shift: Triple = (0.0, 0.0, 0.0)


class ZarrVoxels:
    """One zarr array read as z, y, x; `order` says which of its axes these are.

    Every other axis has length one. With `missing="error"` a stored object (chunk or shard) that is
    absent is a SourceError; "fill" takes the array's fill value. One that cannot be decoded is a
    SourceError always.
    """

    def __init__(self, array: zarr.Array[Any], order: Shape, missing: Missing, address: str) -> None:
        self.array = array
        self.order = order
        self.missing = missing
        self.address = address
        self.shape: Shape = (array.shape[order[0]], array.shape[order[1]], array.shape[order[2]])
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)

    @property
    def chunks(self) -> Shape:
        """The stored object's shape (a shard where there are shards), within the array."""
        z, y, x = (min(self._objects[axis], self.array.shape[axis]) for axis in self.order)
        return (z, y, x)

    @property
    def _objects(self) -> tuple[int, ...]:
        return tuple(self.array.shards or self.array.chunks)

    def read(self, box: Box) -> npt.NDArray[np.float32]:
        """Return the voxels of a box (z, y, x) as a float32 array of its own."""
        region = [slice(0, 1)] * self.array.ndim
        for axis, where in zip(self.order, box, strict=True):
            region[axis] = where
        if self.missing == "error":
            self._require(region)
        try:
            found = np.asarray(self.array[tuple(region)])
        except MemoryError:
            raise
        except Exception as error:
            raise self._corrupt(region, error) from error
        rest = [axis for axis in range(self.array.ndim) if axis not in self.order]
        shape = [where.stop - where.start for where in box]
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which ingest reports
            return np.array(found.transpose([*rest, *self.order]).reshape(shape), dtype=np.float32, order="C")

    def facts(self) -> dict[str, Any]:
        """Return what the metadata states, as plain data."""
        return {
            "kind": f"zarr, format {self.array.metadata.zarr_format}",
            "array": self.array.path,
            "stored_shape": list(self.array.shape),
            "stored_chunks": list(self.array.chunks),
            "stored_shards": list(self.array.shards) if self.array.shards else None,
            "axis_order": self.order,
            "codecs": [type(codec).__name__ for codec in self.array.compressors],
        }

    def identity(self) -> dict[str, Any]:
        """Return what tells this array from another at the same address: a hash of its metadata."""
        text = json.dumps(self.array.metadata.to_dict(), sort_keys=True, default=str)
        return {"metadata": hashlib.sha256(text.encode()).hexdigest()}

    def remarks(self) -> list[str]:
        """Return nothing: zarr metadata leaves no room for guesses."""
        return []

    def _coordinates(self, region: Sequence[slice]) -> Iterator[tuple[int, ...]]:
        """Yield the place in the grid of every stored object that a region touches."""
        ranges = [
            range(where.start // size, (where.stop - 1) // size + 1)
            for where, size in zip(region, self._objects, strict=True)
        ]
        yield from itertools.product(*ranges)

    def _key(self, coordinates: tuple[int, ...]) -> str:
        key = self.array.metadata.encode_chunk_key(coordinates)
        return f"{self.array.path}/{key}" if self.array.path else key

    def _require(self, region: Sequence[slice]) -> None:
        coordinates = list(self._coordinates(region))
        keys = [self._key(place) for place in coordinates]
        present = sync(_all_exist(self.array.store, keys))
        absent = [key for key, there in zip(keys, present, strict=True) if not there]
        if absent:
            more = f" and {len(absent) - 1} more objects" if len(absent) > 1 else ""
            raise self._missing(f"{absent[0]}{more}")

    def _missing(self, what: str) -> SourceError:
        return SourceError(
            f"{self.address} has no object {what}",
            expected="every chunk of the array to be stored",
            remedy='copy the array again, or pass missing="fill" to read absent chunks as the fill value'
            f" {self.array.fill_value} (some writers drop chunks that hold nothing else)",
        )

    def _corrupt(self, region: Sequence[slice], error: Exception) -> SourceError:
        """Return the error that names the object which cannot be decoded."""
        for place in self._coordinates(region):
            part = tuple(
                slice(max(where.start, index * size), min(where.stop, (index + 1) * size))
                for where, index, size in zip(region, place, self._objects, strict=True)
            )
            try:
                self.array[part]
            except Exception as cause:
                return SourceError(
                    f"{self.address} cannot read its object {self._key(place)} ({cause})",
                    expected="a whole chunk in the codec that the array's metadata names",
                    remedy="copy that object again",
                )
        return SourceError(
            f"{self.address} could not be read once ({error}), and could when asked again",
            expected="a store that answers every time",
            remedy="run again",
        )


async def _all_exist(store: Store, keys: list[str]) -> list[bool]:
    return list(await asyncio.gather(*(store.exists(key) for key in keys)))


def open_zarr(
    store: Store, path: str, level: int, missing: Missing, address: str
) -> tuple[ZarrVoxels, Place]:
    """Return the array at `path` of a store, or that of `level` in the OME-Zarr group there.

    Raises
    ------
    SourceError
        Neither an array nor an OME-Zarr group with that level, more than one time or channel, no
        z axis, or values that are not real numbers.
    """
    node = _node(store, path, address)
    if node is None:
        raise _nothing_there(store, path, address)
    if node.is_array:
        _check_level(address, level, 1)
        voxels = as_voxels(_array(store, path, node.form, address), missing, address)
        return voxels, Place(voxels.shape)
    try:
        image = _image(node.attributes)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{address} has OME-Zarr metadata that make no sense ({type(error).__name__}: {error})",
            expected="`multiscales` with `axes` and `datasets` as in OME-Zarr 0.4 and 0.5",
            remedy="pass the path of the array itself with voxel_size",
        ) from error
    if image is None:
        raise _nothing_there(store, path, address)
    return _open_level(store, path, image, level=level, missing=missing, address=address)


def as_voxels(
    array: zarr.Array[Any], missing: Missing, address: str, names: Sequence[str] | None = None
) -> ZarrVoxels:
    """Return the voxels of an array whose axes are `names`, or end with z, y, x where unnamed.

    Raises
    ------
    SourceError
        No z axis, another axis longer than one, or values that are not real numbers.
    """
    names = names or ["?"] * (array.ndim - 3) + ["z", "y", "x"][-array.ndim or 3 :]
    shape = dict(zip(names, array.shape, strict=False))
    if len(names) != array.ndim or "z" not in names or shape["z"] == 1:
        raise SourceError(
            f"{address} is a 2-D image: axes {', '.join(names)}, shape {array.shape}",
            expected="a volume with axes z, y, x",
            remedy="pass the reconstructed tomogram",
        )
    order = (names.index("z"), names.index("y"), names.index("x"))
    longer = [f"{names[axis]} ({n})" for axis, n in enumerate(array.shape) if axis not in order and n != 1]
    if longer:
        raise SourceError(
            f"{address} has more than one volume along {', '.join(longer)}; its shape is {array.shape}",
            expected="length 1 along every axis but z, y, x",
            remedy="write the volume that is wanted to an array of its own",
        )
    check_dtype(np.dtype(array.dtype), address)
    return ZarrVoxels(array, order, missing, address)


def check_dtype(dtype: np.dtype[Any], address: str) -> None:
    """Raise a SourceError where values are not real numbers."""
    if dtype.kind not in "buif":
        raise SourceError(
            f"{address} holds values of type {dtype}",
            expected="real numbers: bool, integers, or floats of 16, 32 or 64 bits",
            remedy="convert it to float32",
        )


@dataclass(frozen=True)
class _Node:
    form: Literal[2, 3]
    is_array: bool
    attributes: dict[str, Any]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _node(store: Store, path: str, address: str) -> _Node | None:
    """Return what lies at a path by asking for the four metadata objects by name."""
    try:
        found = read_json(store, _join(path, "zarr.json"))
        if found is not None:
            return _Node(3, found.get("node_type") == "array", dict(found.get("attributes") or {}))
        is_array = read_json(store, _join(path, ".zarray")) is not None
        attributes = read_json(store, _join(path, ".zattrs"))
        is_group = read_json(store, _join(path, ".zgroup")) is not None
    except (ValueError, TypeError) as error:
        raise SourceError(
            f"the metadata of {address} cannot be read ({error})",
            expected="JSON in zarr.json, or in .zarray, .zgroup and .zattrs",
            remedy="copy the metadata again",
        ) from error
    if not is_array and not is_group and attributes is None:
        return None
    return _Node(2, is_array, attributes or {})


def _array(store: Store, path: str, form: Literal[2, 3], address: str) -> zarr.Array[Any]:
    try:
        return zarr.open_array(store=store, path=path, zarr_format=form, mode="r")
    except MemoryError:
        raise
    except Exception as error:
        raise SourceError(
            f"{address} has array metadata that cannot be used ({type(error).__name__}: {error})",
            expected=f"a zarr array of format {form} with a data type and codecs that are known here",
            remedy="rewrite the array with a current zarr library",
        ) from error


def _nothing_there(store: Store, path: str, address: str) -> SourceError:
    """Return the error that names the children of a folder that is not a tomogram itself."""
    children = sorted(sync(_children(store, path)))
    inside = [
        name for name in children if (node := _node(store, _join(path, name), address)) and node is not None
    ]
    kind = "no OME-Zarr image" if inside else "neither a zarr array nor a zarr group"
    return SourceError(
        f"{address} is {kind}; it holds {', '.join(inside or children[:8]) or 'nothing'}",
        expected="a zarr array, or a group with `multiscales` metadata (OME-Zarr 0.4 or 0.5)",
        remedy=f"pass the path of one of its members, for instance {_join(address, inside[0])}"
        if inside
        else "check the path",
    )


async def _children(store: Store, path: str) -> list[str]:
    return [name async for name in store.list_dir(path)]


@dataclass(frozen=True)
class _Level:
    """One dataset of a multiscale image; per axis as named, None where nothing is stated."""

    path: str
    scale: tuple[float, ...] | None
    translation: tuple[float, ...] | None


@dataclass(frozen=True)
class _Image:
    names: tuple[str, ...] | None
    units: tuple[str | None, ...]
    common: tuple[float, ...] | None
    levels: tuple[_Level, ...]


def _image(attributes: dict[str, Any]) -> _Image | None:
    """Return the first multiscale image of a group's attributes, None where there is none."""
    multiscales = (attributes.get("ome") or attributes).get("multiscales")
    if not multiscales:
        return None
    image = multiscales[0]
    # Before 0.4 axes were plain names, before 0.3 they went without saying.
    axes = [{"name": axis} if isinstance(axis, str) else axis for axis in image.get("axes") or []]
    count = len(axes)
    levels = []
    for dataset in image["datasets"]:
        path = str(dataset["path"])
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"the dataset path {path!r} leaves the group")
        scale, translation = _transform(dataset.get("coordinateTransformations"), count)
        levels.append(_Level(path.rstrip("/"), scale, translation))
    if not levels:
        raise ValueError("no datasets")
    return _Image(
        names=tuple(str(axis["name"]).lower() for axis in axes) or None,
        units=tuple(axis.get("unit") for axis in axes),
        common=_transform(image.get("coordinateTransformations"), count)[0],
        levels=tuple(levels),
    )


def _transform(
    steps: list[dict[str, Any]] | None, count: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return the scale and the translation of a list of transforms (a scale comes first)."""
    found: dict[str, tuple[float, ...]] = {}
    for step in steps or []:
        if step["type"] in ("scale", "translation"):
            values = tuple(float(value) for value in step[step["type"]])
            if len(values) != count or not all(map(math.isfinite, values)):
                raise ValueError(f"a {step['type']} of {values} for {count} axes")
            found[step["type"]] = values
    scale = found.get("scale")
    if scale is not None and min(scale) <= 0:
        raise ValueError(f"a scale of {scale}")
    return scale, found.get("translation")


def _open_level(
    store: Store, path: str, image: _Image, *, level: int, missing: Missing, address: str
) -> tuple[ZarrVoxels, Place]:
    _check_level(address, level, len(image.levels))
    arrays = []
    for wanted in {0: image.levels[0], level: image.levels[level]}.values():
        at = _join(path, wanted.path)
        node = _node(store, at, address)
        if node is None or not node.is_array:
            there = [one.path for one in image.levels if _node(store, _join(path, one.path), address)]
            raise SourceError(
                f"{address} names an array {wanted.path!r} that is not there",
                expected=f"one of those that are: {', '.join(there) or 'none'}",
                remedy="copy the group again, or pass another level",
            )
        arrays.append(as_voxels(_array(store, at, node.form, address), missing, address, image.names))
    return arrays[-1], _place(image, level, arrays[0], arrays[-1])


def _place(image: _Image, level: int, first: ZarrVoxels, voxels: ZarrVoxels) -> Place:
    """Return where a level lies in level 0.

    A stated translation is believed. Where a level states none it is taken as made of block means,
    as the CZ CryoET Data Portal's are: index i is the centre of block i, level-0 index
    `i * f + (f - 1) / 2`.
    """
    zero, here = image.levels[0], image.levels[level]
    order = voxels.order
    if zero.scale and here.scale:
        ratios = [here.scale[axis] / zero.scale[axis] for axis in order]
    else:
        ratios = [large / small for large, small in zip(first.shape, voxels.shape, strict=True)]
    # Scales are often rounded to a thousandth, and odd sizes are rounded up.
    within = 1e-3 if zero.scale and here.scale else 0.5
    factors = [float(round(f)) if abs(f - round(f)) < within * f and round(f) else f for f in ratios]
    if here.translation and zero.scale:
        origin = zero.translation or (0.0,) * len(here.translation)
        shifts = [(here.translation[axis] - origin[axis]) / zero.scale[axis] for axis in order]
    else:
        shifts = [(f - 1.0) / 2.0 for f in factors]
    return Place(first.shape, _voxel_sizes(image, order), _triple(factors), _triple(shifts))


def _voxel_sizes(image: _Image, order: Shape) -> Triple | None:
    """Return the voxel sizes of level 0 in Å, None where scale or units are not stated."""
    scale = image.levels[0].scale
    if scale is None or any(image.units[axis] not in ANGSTROM for axis in order):
        return None
    common = image.common or (1.0,) * len(scale)
    return _triple([scale[axis] * common[axis] * ANGSTROM[str(image.units[axis])] for axis in order])


def _triple(values: list[float]) -> Triple:
    z, y, x = (float(f"{value:.9g}") for value in values)
    return (z, y, x)


def _check_level(address: str, level: int, count: int) -> None:
    if not 0 <= level < count:
        there = "level 0 only" if count == 1 else f"levels 0 to {count - 1}"
        raise SourceError(
            f"{address} has no level {level}",
            expected=f"one of those it has: {there}",
            remedy="pass another level",
        )
