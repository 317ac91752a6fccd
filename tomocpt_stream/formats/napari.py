"""Points layers of napari as it saves them: `index`, `axis-0`, `axis-1`, `axis-2`, and columns of features.

The axes are z, y, x in voxels, 0 at the centre of the first one; give the layer the scale of the
image. Features are `score`, `tomogram`, `particle`, `voxel_size` (Å) and, for turned picks, `r00` to
`r22`, the matrix from particle to tomogram. A point that was added in napari takes the features that
napari had at hand: what it is worth is told by `curation`, which compares places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.csv_tables import MATRIX
from tomocpt_stream.formats.delimited import (
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
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.picks import Picks

AXES = ["axis-0", "axis-1", "axis-2"]
_FEATURES = ["score", "tomogram", "particle", "voxel_size"]


def is_points(head: Head) -> bool:
    """Return whether the first line of a file is that of a points layer."""
    return "axis-0" in head.cells


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of a points layer by tomogram and kind.

    A point without tomogram is of the one that the file is named for, one without score has score 1.
    """
    del format
    head = read_head(path)
    at = {name: column for column, name in enumerate(head.cells)}
    axes = [name for name in head.cells if name.startswith("axis-")]
    if sorted(axes) != AXES:
        raise FormatError(
            f"the first line of {path} is {','.join(head.cells)[:120]!r}",
            expected=f"index, {', '.join(AXES)} (z, y, x in voxels), and features",
            remedy="save the points layer of one three-dimensional image from napari",
        )
    single = [name for name in ("score", "voxel_size") if name in at]
    matrix = [at[name] for name in MATRIX] if set(MATRIX) <= set(at) else []
    numbers = [*(at[name] for name in AXES), *(at[name] for name in single), *matrix]
    names = [name for name in ("tomogram", "particle") if name in at]
    found = read_columns(path, head, numbers=numbers, names=[at[name] for name in names], blank=numbers[3:])
    named = dict(zip(names, found.names, strict=True))
    values = dict(zip(single, found.numbers[:, 3:].T, strict=False))
    every = len(found.numbers)
    stem = path.name[: -len(path.suffix)] if path.suffix else path.name
    nobody = Names([""], np.zeros(every, np.int64))
    tomograms = named.get("tomogram", nobody)
    score = values.get("score", np.full(every, np.nan))
    return Gathered(
        place=str(path),
        tomograms=Names([name or stem for name in tomograms.distinct] or [stem], tomograms.codes),
        particles=named.get("particle", nobody),
        xyz=found.numbers[:, 2::-1],
        scores=np.where(np.isnan(score), 1, score),
        lines=found.lines,
        rotations=found.numbers[:, 3 + len(single) :] if matrix else None,
        voxel_sizes=values.get("voxel_size"),
    ).tables(asked)


def render(picks: Sequence[Picks], format: str, asked: Asked, name: str) -> dict[str, bytes]:  # noqa: A002
    """Return a points layer called `name` with the picks of some tomograms."""
    del format, asked
    turned = any(table.rotations is not None for table in picks)
    parts = [",".join(["index", *AXES, *_FEATURES, *(MATRIX if turned else [])]) + "\n"]
    before = 0
    for table in picks:
        every = len(table)
        size = "" if table.voxel_size is None else repr(float(table.voxel_size))
        cells = [[str(before + row) for row in range(every)]]
        cells += [shortest(table.zyx[:, axis]) for axis in range(3)]
        cells += [shortest(table.score)]
        cells += [[one] * every for one in (quoted(table.tomogram, ","), quoted(table.particle, ","), size)]
        if table.rotations is not None:
            cells += [shortest(column) for column in table.rotations.reshape(-1, 9).T]
        elif turned:
            cells += [[""] * every] * 9
        parts.append(render_rows(cells, ","))
        before += every
    return {name: "".join(parts).encode()}
