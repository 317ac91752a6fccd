"""Zarr arrays and OME-Zarr groups, format 2 and 3: which array is read, and where it lies.

Arrays are opened one by one with the format that their metadata names, never by probing a group.
OME-Zarr metadata of versions 0.4 and 0.5 is read (https://ngff.openmicroscopy.org/0.5/).
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from zarr.core.sync import sync

from tomocpt_stream.errors import SourceError
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.receipts import read_json
from tomocpt_stream.remote import ForbiddenError
from tomocpt_stream.voxels import check_dtype
from tomocpt_stream.zarrays import Missing, ZarrVoxels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zarr.abc.store import Store

    from tomocpt_stream.frame import Shape

Triple = tuple[float, float, float]

ANGSTROM = {
    "picometer": 0.01,
    "angstrom": 1.0,
    "nanometer": 10.0,
    "micrometer": 1e4,
    "millimeter": 1e7,
    "meter": 1e10,
}
# How many members of a folder are looked at to say what it holds.
MOST_CHILDREN = 64


@dataclass(frozen=True)
class Place:
    """Where the array that is read lies in its file; all z, y, x.

    `file_shape` and `voxel_sizes` (Å, None where the file states none) are those of level 0. Index
    i of the array is index `i * scale + shift` of level 0. `levels` is how much coarser than level 0
    each level is, along the axis where it is most; empty where that is not stated.
    """

    file_shape: Shape
    voxel_sizes: Triple | None = None
    scale: Triple = (1.0, 1.0, 1.0)
    shift: Triple = (0.0, 0.0, 0.0)
    levels: tuple[float, ...] = field(default=(), compare=False)  # of the file, not of the array


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
    store = PatientStore(store, SourceError)
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
    names = list(names) if names else ["?"] * (array.ndim - 3) + ["z", "y", "x"][-array.ndim or 3 :]
    said = f"axes {', '.join(names) or 'none'} and shape {array.shape}"
    if len(names) != array.ndim or not {"y", "x"} <= set(names) or 0 in array.shape:
        raise SourceError(
            f"{address} has {said}", expected="a volume with axes z, y, x", remedy="pass another array"
        )
    if "z" not in names or array.shape[names.index("z")] == 1:
        raise SourceError(
            f"{address} is a 2-D image: {said}",
            expected="a volume with axes z, y, x",
            remedy="pass the reconstructed tomogram",
        )
    order = (names.index("z"), names.index("y"), names.index("x"))
    longer = [names[axis] for axis, n in enumerate(array.shape) if axis not in order and n != 1]
    if longer:
        raise SourceError(
            f"{address} holds several volumes: {said}",
            expected="length 1 along every axis but z, y, x",
            remedy="write the volume that is wanted to an array of its own",
        )
    check_dtype(np.dtype(array.dtype), address)
    return ZarrVoxels(array, order, missing, address)


@dataclass(frozen=True)
class _Node:
    form: Literal[2, 3]
    is_array: bool
    attributes: dict[str, Any]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _node(store: Store, path: str, address: str) -> _Node | None:
    """Return what lies at a path by asking for the four metadata objects by name."""
    refused: ForbiddenError | None = None

    def ask(name: str) -> dict[str, Any] | None:
        nonlocal refused
        try:
            return read_json(store, _join(path, name))
        except ForbiddenError as error:  # so does a store that may not be listed answer for what it has not
            refused = error
            return None

    try:
        found = ask("zarr.json")
        if found is not None:
            return _Node(3, found.get("node_type") == "array", dict(found.get("attributes") or {}))
        is_array = ask(".zarray") is not None
        attributes = ask(".zattrs")
        is_group = is_array or ask(".zgroup") is not None
    except SourceError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(
            f"the metadata of {address} cannot be read ({error})",
            expected="JSON in zarr.json, or in .zarray, .zgroup and .zattrs",
            remedy="copy the metadata again",
        ) from error
    if not is_array and not is_group and attributes is None:
        if refused is not None:
            raise refused
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
    children: list[str] = []
    inside: list[str] = []
    with suppress(Exception):  # a web server, or a bucket that may not be listed or refuses a member
        children = sorted(sync(_children(store, path)))[:MOST_CHILDREN]
        inside = [name for name in children if _node(store, _join(path, name), address) is not None]
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
    units: tuple[str, ...]
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
        units=tuple(str(axis.get("unit")).lower() for axis in axes),
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
    levels = [_coarseness(zero, one, order) for one in image.levels]
    known = tuple(level for level in levels if level is not None)
    return Place(
        first.shape,
        _voxel_sizes(image, order),
        _triple(factors),
        _triple(shifts),
        known if len(known) == len(levels) else (),
    )


def _coarseness(zero: _Level, level: _Level, order: Shape) -> float | None:
    """Return how much coarser a level is than level 0 along the axis where it is most."""
    if zero.scale is None or level.scale is None:
        return None
    return max(level.scale[axis] / zero.scale[axis] for axis in order)


def _voxel_sizes(image: _Image, order: Shape) -> Triple | None:
    """Return the voxel sizes of level 0 in Å, None where scale or units are not stated."""
    scale = image.levels[0].scale
    if scale is None or any(image.units[axis] not in ANGSTROM for axis in order):
        return None
    common = image.common or (1.0,) * len(scale)
    return _triple([scale[axis] * common[axis] * ANGSTROM[image.units[axis]] for axis in order])


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
