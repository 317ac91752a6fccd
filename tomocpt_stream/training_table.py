"""The training table: a row for each tomogram that a user has picks of."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from tomocpt_stream.errors import FormatError, SourceError
from tomocpt_stream.known import is_box
from tomocpt_stream.labelled import OTHER_KINDS, LabelledTomogram
from tomocpt_stream.receipts import local_path
from tomocpt_stream.remote import is_remote

if TYPE_CHECKING:
    import os

_NEEDED = ("tomogram", "picks", "diameter")
_OPTIONAL = (
    "contrast",
    "particle",
    "group",
    "annotated",
    "partial",
    "others",
    "weight",
    "voxel_size",
    "beam_axis",
)
_COLUMNS = (*_NEEDED, *_OPTIONAL)
_ANSWERS = {"": False, "no": False, "yes": True}


def read_table(path: str | os.PathLike[str]) -> list[LabelledTomogram]:
    """Return the labelled tomograms of a comma-separated table, whose first line names its columns.

    Columns: tomogram, picks, diameter (Å), and where wanted contrast, particle, group, annotated, partial
    (yes or no), others, weight, voxel_size (Å) and beam_axis (z or y), in any order. A box of `annotated` has
    its sides parted by spaces, or by commas in quotes. Paths are relative to the folder of the table;
    addresses stay as they are. No file of it is opened.

    Raises FormatError, which names the row (the line of the file), where a row cannot be used.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True, skipinitialspace=True)
            rows = [(lines.line_num, _cells(row)) for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(
            f"{path} cannot be read ({error})",
            expected=f"a text table of columns {', '.join(_COLUMNS)}",
            remedy="check the path and how the table was saved",
        ) from error
    rows = [(line, row) for line, row in rows if row]
    head = rows[0][1] if rows else []
    if len(rows) < 2 or len(set(head)) < len(head) or not set(_NEEDED) <= set(head) <= set(_COLUMNS):
        raise FormatError(
            f"{path} with {max(0, len(rows) - 1)} rows and the first line {','.join(head)[:120]!r}",
            expected=f"rows below the columns {', '.join(_NEEDED)} and, where wanted, {', '.join(_OPTIONAL)}",
            remedy="name the columns in the first line",
        )
    return [_row(path, line, head, row) for line, row in rows[1:]]


def _cells(row: list[str]) -> list[str]:
    """Return the cells of a line without the empty ones at its end, which spreadsheets leave."""
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _row(path: Path, line: int, head: list[str], row: list[str]) -> LabelledTomogram:
    origin = f"row {line} of {path}"
    cells = {name: cell for name, cell in zip(head, row, strict=False) if cell}
    missing = [name for name in _NEEDED if name not in cells]
    if missing or len(row) > len(head):
        raise FormatError(
            f"{origin} has {len(row)} cells" + (f", none in {', '.join(missing)}" if missing else ""),
            expected=f"up to {len(head)}, with {', '.join(_NEEDED)}",
            remedy="complete the row, and quote cells that have a comma",
        )
    try:
        diameter, weight = (float(cells.get(name, 1)) for name in ("diameter", "weight"))
        voxel_size = float(cells["voxel_size"]) if "voxel_size" in cells else None
    except ValueError as error:
        raise FormatError(
            f"{origin}: {error}", expected="lengths in Å, a weight", remedy="write plain numbers"
        ) from error
    partial = cells.get("partial", "").lower()
    if partial not in _ANSWERS:
        raise FormatError(f"{origin}: partial {partial!r}", expected="yes or no", remedy="write yes or no")

    places = {
        name: cells[name] if _is_place(name, cells[name]) else str(path.parent / local_path(cells[name]))
        for name in ("tomogram", "picks", "annotated", "others")
        if name in cells
    }
    try:
        return LabelledTomogram(
            places["tomogram"],
            places["picks"],
            diameter,
            cells.get("contrast", "dark"),
            cells.get("particle", ""),
            cells.get("group", ""),
            origin,
            annotated=places.get("annotated"),
            partial=_ANSWERS[partial],
            others=places.get("others"),
            weight=weight,
            voxel_size=voxel_size,
            beam_axis=cells.get("beam_axis", "z"),  # type: ignore[arg-type]  # refused there
        )
    except SourceError as error:
        raise FormatError(error.found, expected=error.expected, remedy=error.remedy) from error


def _is_place(name: str, cell: str) -> bool:
    """Return whether a cell says where something is by itself, and not as a path beside the table."""
    return (
        is_remote(cell) or (name == "annotated" and is_box(cell)) or (name, cell) == ("others", OTHER_KINDS)
    )
