"""Point annotations of the CZ CryoET Data Portal as files: points, what is said of them, their scores.

`<object>-<version>_point.ndjson` (or `_orientedpoint`) has the points (see `ndjson`) and
`<object>-<version>.json` the annotation, whose `object_count` is the number of lines; a file of another
name has its annotation in the .json of that name. What an annotation says of people, dates and
publications is left open. Scores have no place in either: they lie beside (see `side`). A folder has a
folder for each tomogram.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.folders import file_name, files_in, one_kind
from tomocpt_stream.formats.ndjson import parse_ndjson, read_ndjson
from tomocpt_stream.formats.side import beside, scored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.picks import Picks

SUFFIX = ".ndjson"
VERSION = "1.0"
_HALF = 0.5  # how far a refined maximum may lie from the centre of its voxel
_LARGEST_ANNOTATION = 1 << 26
_SHAPE = re.compile(r"_(point|orientedpoint|instancesegmentation)$")


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of a file, or of every one in a folder of folders named for tomograms.

    Raises FormatError where the annotation beside counts other objects than there are.
    """
    del format
    if path.is_file():
        return scored([_table(path, path.name.removesuffix(SUFFIX), asked)], path)
    found = files_in(path, SUFFIX, f"*/*{SUFFIX}")
    return [table for one in found for table in scored([_table(one, one.parent.name, asked)], one)]


def render(picks: Sequence[Picks], format: str, asked: Asked, name: str) -> dict[str, bytes]:  # noqa: A002
    """Return points, annotation and scores; in a folder, for each tomogram and kind of particle."""
    del format
    if name.lower().endswith(SUFFIX):
        return _files(one_kind(picks, name), name, asked)
    files: dict[str, bytes] = {}
    for table in picks:
        plain = re.sub(r"[^a-z0-9]", "_", (table.particle or "particle").lower())
        shape = "point" if table.rotations is None else "orientedpoint"
        key = f"{name}/{file_name(table.tomogram)}/{plain}-{VERSION}_{shape}{SUFFIX}"
        if key in files:
            one_kind([one for one in picks if one.tomogram == table.tomogram], key)
        files |= _files(table, key, asked)
    return files


def annotation(table: Picks, file: str) -> dict[str, Any]:
    """Return what the portal says of an annotation; what picks do not know is None, to be filled in."""
    oriented = table.rotations is not None
    shape = "OrientedPoint" if oriented else "Point"
    return {
        "annotation_object": {"id": None, "name": table.particle, "description": None, "state": None},
        "annotation_method": "heat map of a SwinUNETR-V2 network, its local maxima",
        "annotation_software": _software(),
        "annotation_publications": None,
        "method_type": "automated",
        "method_links": [],
        "ground_truth_status": False,
        "is_curator_recommended": False,
        "authors": [],
        "dates": {"deposition_date": None, "release_date": None, "last_modified_date": None},
        "version": VERSION,
        "object_count": len(table),
        "files": [{"format": "ndjson", "path": file, "shape": shape, "is_visualization_default": False}],
        "voxel_spacing": table.voxel_size,
        "alignment_metadata_path": None,
        "deposition_id": None,
    }


def _software() -> str:
    try:
        return f"tomocpt_stream {version('tomocpt-stream')}"
    except PackageNotFoundError:
        return "tomocpt_stream"


def _files(table: Picks, name: str, asked: Asked) -> dict[str, bytes]:
    known = asked.known(table.tomogram)
    shape = table.shape or (known[1].shape if known else None)
    table = _inside(table, shape)
    said = json.dumps(annotation(table, name.rsplit("/", 1)[-1]), indent=1)
    return {name: _lines(table).encode(), annotation_name(name): said.encode(), **beside([table], name)}


def _lines(table: Picks) -> str:
    """Return the points, without a newline at the end, as the portal's own files have none."""
    xyz = table.zyx[:, ::-1].tolist()
    if table.rotations is None:
        records = [{"type": "point", "location": dict(zip("xyz", place, strict=True))} for place in xyz]
        return "\n".join(map(json.dumps, records))
    return "\n".join(
        json.dumps(
            {
                "type": "orientedPoint",
                "location": dict(zip("xyz", place, strict=True)),
                "xyz_rotation_matrix": matrix,
            }
        )
        for place, matrix in zip(xyz, table.rotations.tolist(), strict=True)
    )


def _table(path: Path, name: str, asked: Asked) -> Picks:
    size, said = asked.of(name), _said(path)
    kind = said.get("annotation_object")
    spacing: Any = said.get("voxel_spacing")
    usable = type(spacing) in (int, float) and 0 < spacing < 1e9
    found = read_ndjson(
        path,
        voxel_size=size.voxel_size or (float(spacing) if usable else None),
        shape=size.shape,
        tomogram=name,
        particle=str(kind.get("name") or "") if isinstance(kind, dict) else "",
    )
    counted = said.get("object_count")
    if counted is not None and counted != len(found):
        objects = parse_ndjson(path.read_bytes(), str(path)).objects
        if counted != objects:
            raise FormatError(
                f"{path} has {objects} objects where {annotation_name(path.name)} says {str(counted)[:40]}",
                expected="an object_count that is the number of objects",
                remedy="fetch both files again, or correct object_count",
            )
    outside = _outside(found, size.shape)
    if outside is not None:
        warnings.warn(f"{path}: {outside}", stacklevel=4)
    return found


def _said(path: Path) -> dict[str, Any]:
    beside = path.with_name(annotation_name(path.name))
    if not beside.is_file():
        return {}
    try:
        with beside.open("rb") as stream:
            said = json.loads(stream.read(_LARGEST_ANNOTATION))
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{beside} cannot be read ({error})",
            expected="the annotation of the points beside it, in JSON",
            remedy="fetch it again, or move it away",
        ) from error
    return said if isinstance(said, dict) else {}


def annotation_name(name: str) -> str:
    """Return the name of the annotation of a file of points, in the same folder."""
    folder, _, file = name.rpartition("/")
    plain = _SHAPE.sub("", file[: -len(SUFFIX)] if file.endswith(SUFFIX) else file)
    return f"{folder}/{plain}.json" if folder else f"{plain}.json"


def _inside(table: Picks, shape: tuple[int, int, int] | None) -> Picks:
    """Return picks as the portal wants them, those of the outermost voxels at their centres or within."""
    if shape is not None:
        last = np.array(shape) - 1.0
        near = np.clip(table.zyx, 0, last)
        table = replace(table, zyx=np.where(np.abs(near - table.zyx) <= _HALF, near, table.zyx))
    outside = _outside(table, shape)
    if outside is not None:
        raise FormatError(
            f"picks of {table.tomogram}: {outside}",
            expected="0 to size - 1 on each axis, as the portal wants",
            remedy="leave these picks out, as --margin does",
        )
    return table


def _outside(table: Picks, shape: tuple[int, int, int] | None) -> str | None:
    """Return which point lies outside of a tomogram, None where none does or its size is not known."""
    if shape is None:
        return None
    wrong = np.flatnonzero(((table.zyx < 0) | (table.zyx > np.array(shape) - 1)).any(axis=1))
    if not len(wrong):
        return None
    x, y, z = table.zyx[wrong[0], ::-1]
    size = " x ".join(map(str, shape[::-1]))
    return f"{len(wrong)} outside of the {size} voxels (x, y, z), point {wrong[0] + 1} at {x:g}, {y:g}, {z:g}"
