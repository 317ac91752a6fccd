"""Dynamo's tables of particles (.tbl): 35 columns or more, without a header; read only.

Position: columns 24 to 26 (x, y, z) plus the shifts of 4 to 6, in voxels of the tomogram that the table
was made for. Whether its first voxel is 0 or 1 the file does not say: `base_index` does. Score: column 10,
the cross-correlation. Angles: 7 to 9, tdrot, tilt, narot in degrees; the matrix from particle to tomogram
is Rz(-tdrot)·Rx(-tilt)·Rz(-narot), which is what RELION writes as rot = narot - 90, tilt, psi = tdrot + 90.
Tomogram: the number of column 20, by the name that the .doc beside the table (or passed as `tomograms`)
gives it, else that number. The kind is the class of column 22 where there are several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.delimited import LONGEST_LINE, Head, Names, read_columns, read_head, wrong_line
from tomocpt_stream.formats.gathered import Gathered

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.formats.delimited import Codes, Floats
    from tomocpt_stream.picks import Picks

COLUMNS = 26
_SHIFTS, _ANGLES, _SCORE, _TOMOGRAM, _CLASS, _XYZ = (3, 4, 5), (6, 7, 8), 9, 19, 21, (23, 24, 25)
_SUFFIXES = (".gz", ".bz2", ".mrc", ".rec", ".map", ".em", ".st", ".zarr")


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of a table by tomogram and class."""
    del format
    if asked.base_index not in (0, 1):
        raise FormatError(
            f"{path} does not say whether its first voxel is 0 or 1",
            expected="base_index=0 or base_index=1",
            remedy="pass base_index= (--base-index): 1 for coordinates that count as MATLAB does, else 0",
        )
    head = read_head(path, blanks=True)
    if head.cells and (len(head.cells) < COLUMNS or not head.is_data):
        raise FormatError(
            f"the first line of {path} has {len(head.cells)} cells: {' '.join(head.cells)[:80]!r}",
            expected=f"a Dynamo table: numbers without a header, {COLUMNS} columns or more",
            remedy="check that it is a .tbl of particles",
        )
    wanted = [*_XYZ, *_SHIFTS, *_ANGLES, _SCORE, _TOMOGRAM, _CLASS]
    found = read_columns(path, head if head.cells else Head(("0",) * COLUMNS, None), numbers=wanted)
    values = found.numbers
    tomograms, kinds = (_whole(values[:, place], found.lines, path) for place in (10, 11))
    classes = {} if len(np.unique(kinds)) > 1 else {int(one): "" for one in kinds[:1]}
    return Gathered(
        place=str(path),
        tomograms=_named(tomograms, _names(path, asked)),
        particles=_named(kinds, classes),
        xyz=values[:, :3] + values[:, 3:6] - asked.base_index,
        scores=values[:, 9],
        lines=found.lines,
        rotations=matrices_of(values[:, 6:9]).reshape(-1, 9),
    ).tables(asked)


def matrices_of(angles: Floats) -> Floats:
    """Return the (n, 3, 3) matrices from particle to tomogram of (n, 3) tdrot, tilt, narot in degrees."""
    if not len(angles):
        return np.zeros((0, 3, 3))
    return np.asarray(Rotation.from_euler("ZXZ", -angles, degrees=True).as_matrix())


def read_doc(path: Path) -> dict[int, str]:
    """Return the names of tomograms by number, from lines of a number and a path."""
    found: dict[int, str] = {}
    if path.stat().st_size > 1 << 26:
        raise FormatError(
            f"{path} has {path.stat().st_size} bytes", expected="a list of tomograms", remedy="check the path"
        )
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            cells = line[:LONGEST_LINE].split(None, 1)
            if not cells:
                continue
            if len(cells) != 2 or not cells[0].isascii() or not cells[0].isdigit() or len(cells[0]) > 9:
                raise wrong_line(path, number, repr(line[:60]), "the number of a tomogram and its path")
            found[int(cells[0])] = _plain(cells[1].strip())
    return found


def _names(path: Path, asked: Asked) -> dict[int, str]:
    beside = path.with_suffix(".doc")
    if asked.numbers is not None:
        return dict(asked.numbers)
    return read_doc(beside) if beside.is_file() else {}


def _plain(name: str) -> str:
    last = name.replace("\\", "/").split("/")[-1]
    for suffix in _SUFFIXES:
        last = last.removesuffix(suffix)
    return last or name


def _whole(values: Floats, lines: Codes, path: Path) -> Codes:
    wrong = np.flatnonzero(values != np.floor(values))
    if len(wrong):
        line = int(lines[wrong[0]])
        raise wrong_line(path, line, f"{values[wrong[0]]:g}", "whole numbers in columns 20 and 22")
    return values.astype(np.int64)


def _named(values: Codes, names: dict[int, str]) -> Names:
    """Return numbers as names: by `names`, or as they are. Two numbers of one name are one tomogram."""
    distinct, codes = np.unique(values, return_inverse=True)
    texts = [names.get(int(number), str(number)) for number in distinct]
    order = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    return Names(list(order), np.array([order[text] for text in texts], dtype=np.int64)[codes.ravel()])
