"""Tables of points between commas or tabs, each known by its header.

"csv", "tsv"
    Our own (see `csv_tables`). Reading as "csv" takes the next two, and napari's points layers, too.
"czii"
    `experiment`, `particle_type`, `x`, `y`, `z` in Å, perhaps `id`: the tables of the CZII challenge.
"tardis"
    `IDs`, `X [A]`, `Y [A]`, `Z [A]`: points of numbered instances, in Å; read only.
"portal_csv"
    x, y, z in voxels, with that header or none: what the CZ CryoET Data Portal takes in. Nothing in such
    a file says that it is in voxels, so that it is only read under this name. One tomogram a file.

Å = index x voxel size. Scores of "czii" and "portal_csv" lie beside (see `side`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import csv_tables, napari
from tomocpt_stream.formats.csv_tables import Dialect, own_dialect, read_table, tomogram_of
from tomocpt_stream.formats.delimited import Head, quoted, read_columns, read_head, render_rows, shortest
from tomocpt_stream.formats.folders import files_in, one_kind, places
from tomocpt_stream.formats.side import SUFFIX as SIDE
from tomocpt_stream.formats.side import beside, read_beside, scored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.picks import Picks

UNNAMED = "particle"
_CZII = ["experiment", "particle_type", "x", "y", "z"]
_TARDIS = ["IDs", "X [A]", "Y [A]", "Z [A]"]


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of each tomogram and kind of a table; without `format` its header tells which."""
    if format == "portal_csv":
        files = [one for one in files_in(path, ".csv") if not one.name.endswith(SIDE)]
        return [table for one in files for table in scored(_plain(one, asked), one)]
    if path.is_dir():
        raise FormatError(f"the folder {path}", expected="a file", remedy="read its files one by one")
    head = read_head(path)
    if format in (None, "csv") and napari.is_points(head):
        return napari.read(path, format, asked)
    dialect = {"czii": _czii, "tardis": _tardis}.get(format or "", _any)(head)
    if dialect is None:
        raise FormatError(
            f"the first line of {path} is {','.join(head.cells)[:120]!r}",
            expected="a header that says the units: x [voxel], y [voxel], z [voxel] or x [angstrom], ...; "
            "or experiment, particle_type, x, y, z; or IDs, X [A], Y [A], Z [A]",
            remedy='add the units to the header; x, y, z in voxels: format="portal_csv" (--from)',
        )
    if own_dialect(head):
        return read_table(path, head, dialect, asked)
    sizes = {one.tomogram: one.voxel_size for one in read_beside(path)}
    return scored(read_table(path, head, dialect, asked, sizes=sizes), path, in_angstrom=True)


def instances(path: Path) -> list[int]:
    """Return the number of the instance that each row of a tardis table belongs to."""
    head = read_head(path)
    found = read_columns(path, head, numbers=[head.cells.index(_TARDIS[0])])
    return [int(value) for value in found.numbers[:, 0]]


def render(picks: Sequence[Picks], format: str, asked: Asked, name: str) -> dict[str, bytes]:  # noqa: A002
    """Return a table called `name` with the picks of some tomograms, and their scores where it has none."""
    if format in ("csv", "tsv"):
        return csv_tables.render(picks, format, asked, name)
    if format == "czii":
        return {name: _czii_table(picks).encode(), **beside(picks, name)}
    files: dict[str, bytes] = {}
    for file, tables in places(picks, name, ".csv").items():
        table = one_kind(tables, file)
        cells = [shortest(table.zyx[:, axis]) for axis in (2, 1, 0)]
        files |= {file: f"x,y,z\n{render_rows(cells, ',')}".encode(), **beside([table], file)}
    return files


def _czii_table(picks: Sequence[Picks]) -> str:
    parts, before = ["id,experiment,particle_type,x,y,z\n"], 0
    for table in picks:
        said = [quoted(one, ",") for one in (tomogram_of(table), table.particle or UNNAMED)]
        ids = [str(before + row) for row in range(len(table))]
        xyz = np.round(table.angstrom(), 6)
        cells = [ids, *([one] * len(table) for one in said), *(shortest(column) for column in xyz.T)]
        parts.append(render_rows(cells, ","))
        before += len(table)
    return "".join(parts)


def _any(head: Head) -> Dialect | None:
    return own_dialect(head) or _czii(head) or _tardis(head)


def _czii(head: Head) -> Dialect | None:
    if not set(_CZII) <= set(head.cells):
        return None
    experiment, kind, x, y, z = (head.cells.index(name) for name in _CZII)
    return Dialect((x, y, z), in_angstrom=True, tomogram=experiment, particle=kind)


def _tardis(head: Head) -> Dialect | None:
    if not set(_TARDIS) <= set(head.cells):
        return None
    _, x, y, z = (head.cells.index(name) for name in _TARDIS)
    return Dialect((x, y, z), in_angstrom=True)


def _plain(path: Path, asked: Asked) -> list[Picks]:
    head = read_head(path)
    lowered = [cell.lower() for cell in head.cells]
    if not head.cells or len(head.cells) != 3 or not (head.is_data or lowered == ["x", "y", "z"]):
        raise FormatError(
            f"the first line of {path} is {','.join(head.cells)[:120]!r}",
            expected="three columns, x, y, z in voxels, with that header or none",
            remedy="leave the format out if the header says the units, else keep these columns alone",
        )
    return read_table(path, head, Dialect((0, 1, 2), in_angstrom=False), asked)
