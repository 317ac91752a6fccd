"""`.coords` files of crYOLO, TomoTwin and DeepETPicker: x y z in voxels of the tomogram, without a header.

0 is the centre of the first voxel. A file is of one tomogram, which it is named for. "coords" has three
columns; "deepetpicker" has the number of the class before them, and is only read under that name,
because four columns could be other things. Scores lie beside the file (see `side`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.delimited import Columns, read_columns, read_head, render_rows, wrong_line
from tomocpt_stream.formats.folders import files_in, one_kind, places
from tomocpt_stream.formats.side import beside, scored
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked

SUFFIX = ".coords"
_COLUMNS = {"coords": "x y z", "deepetpicker": "class x y z"}


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of a file, or of every .coords file of a folder."""
    return [table for one in files_in(path, SUFFIX) for table in _read_one(one, format or "coords", asked)]


def render(picks: Sequence[Picks], format: str, asked: Asked, name: str) -> dict[str, bytes]:  # noqa: A002
    """Return a file for each tomogram, with its scores beside it."""
    del asked
    files: dict[str, bytes] = {}
    kinds = {kind: str(i) for i, kind in enumerate(dict.fromkeys(table.particle for table in picks), start=1)}
    for file, tables in places(picks, name, SUFFIX).items():
        if format == "coords":
            one_kind(tables, file)
        parts = []
        for table in tables:
            cells = [[f"{value:.6f}" for value in table.zyx[:, axis]] for axis in (2, 1, 0)]
            if format == "deepetpicker":
                cells = [[kinds[table.particle]] * len(table), *cells]
            parts.append(render_rows(cells, " " if format == "coords" else "\t"))
        files |= {file: "".join(parts).encode(), **beside(tables, file)}
    return files


def _read_one(path: Path, format: str, asked: Asked) -> list[Picks]:  # noqa: A002
    head = read_head(path, blanks=True)
    wide = len(_COLUMNS[format].split())
    if head.cells and (len(head.cells) != wide or not head.is_data):
        raise FormatError(
            f"the first line of {path} is {' '.join(head.cells)[:80]!r}",
            expected=f"{_COLUMNS[format]}, numbers without a header",
            remedy="four columns with the class first are read with format='deepetpicker' (--from)",
        )
    columns = range(wide) if head.cells else []
    found = read_columns(path, head, numbers=list(columns)) if head.cells else None
    xyz = np.zeros((0, 3)) if found is None else found.numbers[:, wide - 3 :]
    classes = np.zeros(len(xyz)) if found is None or wide == 3 else _classes(found, path)
    name = path.name.removesuffix(SUFFIX)
    size = asked.of(name)
    tables = [
        Picks(
            zyx=xyz[classes == one][:, ::-1],
            score=np.ones(np.count_nonzero(classes == one), np.float32),
            voxel_size=size.voxel_size,
            tomogram=name,
            shape=size.shape,
            particle="" if wide == 3 else f"{one:g}",
        )
        for one in (np.unique(classes) if len(classes) else [0.0])
    ]
    return scored(tables, path)


def _classes(found: Columns, path: Path) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the classes of rows; one that is no whole number is an error."""
    classes: np.ndarray[tuple[int], np.dtype[np.float64]] = found.numbers[:, 0]
    wrong = np.flatnonzero(classes != np.floor(classes))
    if len(wrong):
        raise wrong_line(
            path, int(found.lines[wrong[0]]), f"the class {classes[wrong[0]]:g}", "a whole number, then x y z"
        )
    return classes
