"""Tomograms with their truth, as users have them: a table of files becomes examples to learn from."""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.crops import Example, example
from tomocpt_stream.errors import ActionableError, FormatError, SourceError
from tomocpt_stream.formats import read_kinds
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.picks import Picks
from tomocpt_stream.pipeline import VOLUME, level_for, plan_pick, scratch_folder
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.receipts import config_hash
from tomocpt_stream.remote import is_remote
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.volume import ingest

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from tomocpt_stream.frame import Grid
    from tomocpt_stream.picker import Picker

_NEEDED = ("tomogram", "picks", "diameter")
_COLUMNS = (*_NEEDED, "contrast", "particle", "group")


@dataclass(frozen=True, eq=False)
class LabelledTomogram:
    """A tomogram with the truth of one kind of particle; every particle of that kind is in it.

    `tomogram` is open, or what `open_tomogram` takes; `picks` are in its voxels, or a file of any format
    that `read_picks` knows: of several tomograms in it those of this one's name count, of several kinds
    those of `particle`. `diameter` (longest axis, Å) sets the working grid; `contrast` says how protein
    looks, "dark" or "bright". Tomograms of one `group` are all learnt from or all kept for validation;
    without one a tomogram is a group by itself. `origin` is how errors call it.
    """

    tomogram: Tomogram | str | Path
    picks: Picks | str | Path
    diameter: float
    contrast: str = "dark"
    particle: str = ""
    group: str = ""
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuse what no picker can be fed with."""
        if not (math.isfinite(self.diameter) and self.diameter > 0):
            raise SourceError(
                f"{self}: a diameter of {self.diameter} Å",
                expected="a positive number",
                remedy="give the longest axis of the particle in Å",
            )
        if self.contrast not in ("dark", "bright"):
            raise SourceError(
                f"{self}: contrast {self.contrast!r}",
                expected="dark or bright",
                remedy="say how protein looks in this tomogram",
            )

    def __str__(self) -> str:
        name = self.tomogram.name if isinstance(self.tomogram, Tomogram) else str(self.tomogram)
        return self.origin or name


def read_table(path: str | os.PathLike[str]) -> list[LabelledTomogram]:
    """Return the labelled tomograms of a comma-separated table, whose first line names its columns.

    Columns: tomogram, picks, diameter (Å), and where wanted contrast, particle and group, in any order.
    Paths are relative to the folder of the table; addresses stay as they are. No file of it is opened.

    Raises FormatError, which names the row (the line of the file), where a row cannot be used.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(
            f"{path} cannot be read ({error})",
            expected=f"a text table of columns {', '.join(_COLUMNS)}",
            remedy="check the path and how the table was saved",
        ) from error
    rows = [(line, row) for line, row in rows if any(row)]
    head = rows[0][1] if rows else []
    if len(rows) < 2 or len(set(head)) < len(head) or not set(_NEEDED) <= set(head) <= set(_COLUMNS):
        raise FormatError(
            f"{path} with {max(0, len(rows) - 1)} rows and the first line {','.join(head)[:120]!r}",
            expected=f"rows below the columns {', '.join(_NEEDED)} and, where wanted, "
            f"{', '.join(_COLUMNS[len(_NEEDED) :])}",
            remedy="name the columns in the first line",
        )
    return [_row(path, line, head, row) for line, row in rows[1:]]


@dataclass(frozen=True, eq=False)
class Opened:
    """A labelled tomogram whose header and picks were read: no voxel yet.

    `fingerprint` is that of all that its crops follow from: voxels, grid, centres, contrast.
    """

    tomogram: Tomogram
    picks: Picks
    grid: Grid
    negate: bool
    group: str
    fingerprint: str

    def ingest(self, folder: Path, *, progress: Progress = silent) -> Example:
        """Return the example, its working volume streamed into `folder` unless it is there already."""
        store = folder / scratch_folder(self.tomogram, self.grid) / VOLUME
        volume = ingest(self.tomogram, store, voxel_size=self.grid.voxel_size, progress=progress)
        return example(volume, self.picks, negate=self.negate)


def open_labelled(items: Iterable[LabelledTomogram], picker: Picker) -> list[Opened]:
    """Open tomograms and read their truth, for the particle radius and the contrast of a picker.

    Raises
    ------
    SourceError, FormatError
        One cannot be read, has most of its particles outside its volume, or is there twice at one
        diameter, so that a particle of one row would be a negative of the other. It names the row.
    """
    opened: list[Opened] = []
    seen: dict[str, str] = {}
    for item in items:
        try:
            one = _open(item, picker)
        except (ActionableError, OSError) as error:
            kind = type(error) if isinstance(error, ActionableError) else SourceError
            raise _named(item, error, kind) from error
        place = scratch_folder(one.tomogram, one.grid)
        if place in seen:
            raise SourceError(
                f"{item} is the tomogram of {seen[place]} again, at the same diameter",
                expected="one row for a tomogram and a diameter",
                remedy="put all of its particles into one file",
            )
        seen[place] = str(item)
        opened.append(one)
    return opened


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
        diameter = float(cells.pop("diameter"))
    except ValueError as error:
        raise FormatError(
            f"{origin}: {error}", expected="a diameter in Å", remedy="write a plain number"
        ) from error
    tomogram, picks = (
        cells[name] if is_remote(cells[name]) else str(path.parent / cells[name])
        for name in ("tomogram", "picks")
    )
    contrast = cells.get("contrast", "dark")
    particle, group = cells.get("particle", ""), cells.get("group", "")
    try:
        return LabelledTomogram(tomogram, picks, diameter, contrast, particle, group, origin)
    except SourceError as error:
        raise FormatError(error.found, expected=error.expected, remedy=error.remedy) from error


def _open(item: LabelledTomogram, picker: Picker) -> Opened:
    whole = item.tomogram if isinstance(item.tomogram, Tomogram) else open_tomogram(item.tomogram)
    voxel, extent = whole.frame.file_voxel_size, max(whole.frame.file_shape)
    if not 2 <= item.diameter / voxel <= extent:
        raise SourceError(
            f"a diameter of {item.diameter:g} Å, {item.diameter / voxel:.3g} voxels of {whole.name}",
            expected=f"at least 2 voxels, and no more than its longest edge of {extent}",
            remedy="give the longest axis of the particle in Å",
        )
    options = PickOptions(diameter=item.diameter)
    tomogram = level_for(whole, picker, options)
    grid, _ = plan_pick(tomogram, picker, options)
    picks = _truth(item, tomogram)
    _refuse_outside(picks, tomogram, item.diameter)
    negate = item.contrast != picker.contrast
    made: dict[str, Any] = {
        "tomogram": tomogram.fingerprint,
        "grid": grid.to_json(),
        "centres": hashlib.sha256(picks.zyx.tobytes()).hexdigest(),
        "negate": negate,
    }
    group = item.group or f"{tomogram.name} ({config_hash(tomogram.fingerprint)[:6]})"
    return Opened(tomogram, picks, grid, negate, group, config_hash(made))


def _truth(item: LabelledTomogram, tomogram: Tomogram) -> Picks:
    """Return the picks of an item, in voxels of the tomogram's file."""
    frame = tomogram.frame
    if isinstance(item.picks, Picks):
        size = item.picks.voxel_size
        if size is not None and not math.isclose(size, frame.file_voxel_size, rel_tol=1e-3):
            raise SourceError(
                f"picks in voxels of {size:g} Å of a tomogram with voxels of {frame.file_voxel_size:g} Å",
                expected="picks in the voxels of the tomogram",
                remedy="read them with the tomogram's voxel_size",
            )
        return item.picks
    wanted = item.particle or None
    tables = read_kinds(item.picks, voxel_size=frame.file_voxel_size, shape=frame.file_shape, particle=wanted)
    names = sorted({table.tomogram for table in tables})
    # A file of one tomogram belongs to it whatever it is called there: the row says so.
    found = [table for table in tables if len(names) == 1 or table.tomogram == tomogram.name]
    if wanted is not None:
        found = [table for table in found if table.particle in (wanted, "")]
    if len(found) != 1:
        kinds = sorted({table.particle for table in found})
        raise FormatError(
            f"{item.picks} has {len(found)} tables for {tomogram.name!r}"
            + (f" of {wanted!r}" if wanted else "")
            + f"; its tomograms are {_some(names)}"
            + (f"; kinds {_some(kinds)}" if kinds else ""),
            expected="one table: a tomogram by its name and one kind of particle",
            remedy="correct the tomogram's name or the particle",
        )
    return found[0]


def _refuse_outside(picks: Picks, tomogram: Tomogram, diameter: float) -> None:
    frame = tomogram.frame
    margin = diameter / 2 / frame.file_voxel_size
    beyond = (picks.zyx < -margin) | (picks.zyx > np.array(frame.file_shape) - 1 + margin)
    outside = int(beyond.any(axis=1).sum())
    if 2 * outside > len(picks):
        raise SourceError(
            f"{outside} of {len(picks)} particles outside {tomogram.name} of {frame.file_shape} voxels (zyx)",
            expected="coordinates in the voxels of this tomogram",
            remedy="check the voxel size that the coordinates were written with, and their axes",
        )


def _named(
    item: LabelledTomogram, error: ActionableError | OSError, kind: type[ActionableError]
) -> ActionableError:
    if isinstance(error, ActionableError):
        return kind(f"{item}: {error.found}", expected=error.expected, remedy=error.remedy)
    return kind(f"{item}: {error}", expected="files that can be read", remedy="check the paths")


def _some(names: Iterable[str]) -> str:
    def shown() -> Iterator[str]:
        for index, name in enumerate(names):
            if index < 10:
                yield repr(name)
            elif index == 10:
                yield "and more"

    return ", ".join(shown()) or "none"
