"""Our own table of points, and any other whose columns somebody has found.

Columns: `tomogram`, `particle`, `x [voxel]`, `y [voxel]`, `z [voxel]` (0 is the centre of the first voxel),
`score`, `voxel size [angstrom]`, `size x [voxel]` and y, z, and, where picks are turned, `r00` to `r22`, the
matrix from particle to tomogram row by row. Nothing is lost in it. It is also read with `x [angstrom]`, and
with x, y, z alone of these; a tomogram without picks is a row without numbers. A row whose `mark` is
"removed" is no pick: that is how curation lists those that somebody took away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.delimited import (
    Columns,
    Floats,
    Head,
    Names,
    quoted,
    read_columns,
    read_head,
    render_rows,
    shortest,
)
from tomocpt_stream.formats.gathered import Gathered

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.picks import Picks

MATRIX = [f"r{row}{column}" for row in range(3) for column in range(3)]
VOXEL_SIZE = "voxel size [angstrom]"
SIZES = ["size x [voxel]", "size y [voxel]", "size z [voxel]"]
MARK = "mark"
PICKED, MANUAL, REMOVED = "picked", "manual", "removed"
_UNITS = {"voxel": False, "voxels": False, "angstrom": True, "Å": True, "A": True}


@dataclass(frozen=True)
class Dialect:
    """Where the columns of a table are; what it does not have is None or empty."""

    xyz: tuple[int, int, int]
    in_angstrom: bool
    tomogram: int | None = None
    particle: int | None = None
    score: int | None = None
    voxel_size: int | None = None
    sizes: tuple[int, ...] = ()
    matrix: tuple[int, ...] = ()
    mark: int | None = None
    gaps: bool = False


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of each tomogram and kind of our own table."""
    del format
    head = read_head(path)
    dialect = own_dialect(head)
    if dialect is None:
        raise FormatError(
            f"the first line of {path} is {','.join(head.cells)[:120]!r}",
            expected="a header with x [voxel], y [voxel], z [voxel] or x [angstrom], ...",
            remedy="add the units to the header",
        )
    return read_table(path, head, dialect, asked)


def render(picks: Sequence[Picks], format: str, asked: Asked, name: str) -> dict[str, bytes]:  # noqa: A002
    """Return our own table called `name`, with tabs where the format is "tsv"."""
    del asked
    return {name: own_table(picks, "\t" if format == "tsv" else ",").encode()}


def read_table(
    path: Path,
    head: Head,
    dialect: Dialect,
    asked: Asked,
    *,
    marked: str | None = None,
    sizes: Mapping[str, float | None] | None = None,
) -> list[Picks]:
    """Return the picks of each tomogram and kind of a table whose columns are known.

    A table without names is of the tomogram that the file is named for. Picks without score have 1.
    With `marked`, only rows of that mark are taken; else all but those that were removed. `sizes` are the
    voxel sizes (Å) by tomogram that were said elsewhere.
    """
    numbers, at = _numbers(dialect)
    names = [column for column in (dialect.tomogram, dialect.particle, dialect.mark) if column is not None]
    found = read_columns(path, head, numbers=numbers, names=names, blank=numbers if dialect.gaps else [])
    rows = _gathered(found, dialect, at, path, marked)
    if sizes:
        known = [sizes.get(name) or np.nan for name in rows.tomograms.distinct]
        rows = replace(rows, voxel_sizes=np.array(known, dtype=np.float64)[rows.tomograms.codes])
    return rows.tables(asked)


def own_table(picks: Sequence[Picks], delimiter: str, marks: Sequence[str] | None = None) -> str:
    """Return our own table; `marks`, one for each table of picks, makes one more column."""
    turned = any(table.rotations is not None for table in picks)
    header = ["tomogram", "particle", "x [voxel]", "y [voxel]", "z [voxel]", "score", VOXEL_SIZE, *SIZES]
    header += [*(MATRIX if turned else []), *([MARK] if marks is not None else [])]
    parts = [delimiter.join(header) + "\n"]
    for index, table in enumerate(picks):
        size = "" if table.voxel_size is None else repr(float(table.voxel_size))
        shape = ["", "", ""] if table.shape is None else [str(n) for n in table.shape[::-1]]
        marked = [] if marks is None else [marks[index]]
        said = [quoted(tomogram_of(table), delimiter), quoted(table.particle, delimiter)]
        if not len(table):
            empty = ["", "", "", "", size, *shape, *([""] * 9 if turned else []), *marked]
            parts.append(delimiter.join([*said, *empty]) + "\n")
            continue
        every = len(table)
        cells = [[one] * every for one in said]
        cells += [shortest(table.zyx[:, axis]) for axis in (2, 1, 0)]
        cells += [shortest(table.score), *([one] * every for one in (size, *shape))]
        if turned and table.rotations is None:
            cells += [[""] * every] * 9
        elif table.rotations is not None:
            cells += [shortest(column) for column in table.rotations.reshape(-1, 9).T]
        cells += [[one] * every for one in marked]
        parts.append(render_rows(cells, delimiter))
    return "".join(parts)


def tomogram_of(table: Picks) -> str:
    """Return the name of the tomogram of some picks; one without is an error."""
    if table.tomogram:
        return table.tomogram
    raise FormatError(
        "picks of a tomogram without a name",
        expected="a name in each row",
        remedy="name it: dataclasses.replace(picks, tomogram=...), or pass a mapping of names",
    )


def own_dialect(head: Head) -> Dialect | None:
    """Return where the columns of our own table are, None where it is not one."""
    cells = head.cells
    units = [unit for unit in _UNITS if {f"{axis} [{unit}]" for axis in "xyz"} <= set(cells)]
    if not units:
        return None
    wanted = [f"{axis} [{units[0]}]" for axis in "xyz"]
    at = {name: index for index, name in enumerate(cells)}
    turned = set(MATRIX) <= set(cells)
    return Dialect(
        (at[wanted[0]], at[wanted[1]], at[wanted[2]]),
        _UNITS[units[0]],
        at.get("tomogram"),
        at.get("particle"),
        at.get("score"),
        at.get(VOXEL_SIZE),
        tuple(at[size] for size in SIZES) if set(SIZES) <= set(cells) else (),
        tuple(at[one] for one in MATRIX) if turned else (),
        at.get(MARK),
        gaps=True,
    )


def _numbers(dialect: Dialect) -> tuple[list[int], dict[int, int]]:
    """Return the columns of numbers, and where each of them comes among them."""
    one = [column for column in (dialect.score, dialect.voxel_size) if column is not None]
    columns = [*dialect.xyz, *one, *dialect.sizes, *dialect.matrix]
    return columns, {column: place for place, column in enumerate(columns)}


def _gathered(
    found: Columns, dialect: Dialect, at: dict[int, int], path: Path, marked: str | None
) -> Gathered:
    stem = path.name[: -len(path.suffix)] if path.suffix else path.name
    names = dict(
        zip(
            [one for one in (dialect.tomogram, dialect.particle, dialect.mark) if one is not None],
            found.names,
            strict=True,
        )
    )
    every = len(found.numbers)

    def named(column: int | None, otherwise: str) -> Names:
        return Names([otherwise], np.zeros(every, np.int64)) if column is None else names[column]

    def numbers(columns: Sequence[int]) -> Floats:
        return found.numbers[:, [at[column] for column in columns]]

    tomograms, particles = named(dialect.tomogram, stem), named(dialect.particle, "")
    _refuse_nameless(tomograms, found, path)
    xyz = numbers(dialect.xyz)
    scores = np.full(every, np.nan) if dialect.score is None else numbers([dialect.score])[:, 0]
    _refuse_gaps(xyz, scores, found, path)
    if dialect.mark is not None:
        marks = names[dialect.mark]
        if marked is not None:
            _refuse_unknown(marks, found, path)
        keep = np.array([_wanted(mark, marked) for mark in marks.distinct], dtype=bool)[marks.codes]
        xyz = np.where(keep[:, None], xyz, np.nan)  # no pick, but a row of its tomogram
    return Gathered(
        place=str(path),
        tomograms=tomograms,
        particles=particles,
        xyz=xyz,
        scores=np.where(np.isnan(scores), 1, scores),
        lines=found.lines,
        in_angstrom=dialect.in_angstrom,
        rotations=numbers(dialect.matrix) if dialect.matrix else None,
        voxel_sizes=None if dialect.voxel_size is None else numbers([dialect.voxel_size])[:, 0],
        sizes=numbers(dialect.sizes) if dialect.sizes else None,
    )


def _wanted(mark: str, marked: str | None) -> bool:
    return mark != REMOVED if marked is None else mark == marked


def _refuse_unknown(marks: Names, found: Columns, path: Path) -> None:
    for code, mark in enumerate(marks.distinct):
        if mark not in (PICKED, MANUAL, REMOVED):
            line = found.lines[np.flatnonzero(marks.codes == code)[0]]
            raise FormatError(
                f"line {line} of {path} has the mark {mark!r}",
                expected=f"{PICKED}, {MANUAL} or {REMOVED}",
                remedy="correct that line",
            )


def _refuse_nameless(tomograms: Names, found: Columns, path: Path) -> None:
    for code, name in enumerate(tomograms.distinct):
        if not name or not name.isprintable():
            line = found.lines[np.flatnonzero(tomograms.codes == code)[0]]
            raise FormatError(
                f"line {line} of {path} has the tomogram name {name!r}",
                expected="a name of printable characters",
                remedy="correct that line",
            )


def _refuse_gaps(xyz: Floats, scores: Floats, found: Columns, path: Path) -> None:
    gaps = np.isnan(xyz)
    wrong = np.flatnonzero(gaps.any(axis=1) & ~(gaps.all(axis=1) & np.isnan(scores)))
    if len(wrong):
        raise FormatError(
            f"line {found.lines[wrong[0]]} of {path} lacks one of x, y and z",
            expected="all three, or none of them in the row of a tomogram without picks",
            remedy="correct or remove that line",
        )
