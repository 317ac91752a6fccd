"""Scores beside a file whose format has no place for them, and which picks of two tables are the same.

`NAME.scores.csv` lies beside `NAME` (with its suffix) and is a table of `csv_tables`, with the name and
voxel size of the tomogram. A score belongs to a place, not to a row: a file that was edited takes none
that is not its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from tomocpt_stream.formats import SCORES
from tomocpt_stream.formats.asked import Asked
from tomocpt_stream.formats.csv_tables import read, render

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.frame import Points
    from tomocpt_stream.picks import Picks

Rows = npt.NDArray[np.intp]

SAME_PLACE = 1e-2
_SAME_SIZE = 1e-2  # sizes that differ by less are one size that was rounded
SUFFIX = SCORES


def beside(tables: Sequence[Picks], name: str) -> dict[str, bytes]:
    """Return the side file of the file `name`."""
    bare = [replace(table, rotations=None) for table in tables]
    return render(bare, "csv", Asked(), f"{name}{SUFFIX}")


def read_beside(path: Path) -> list[Picks]:
    """Return the tables of the side file of `path`, none where there is none."""
    side = path.with_name(f"{path.name}{SUFFIX}")
    return read(side, "csv", Asked()) if side.is_file() else []


def scored(tables: Sequence[Picks], path: Path, *, in_angstrom: bool = False) -> list[Picks]:
    """Return tables with the scores of the side file of `path`, as they are where there is none.

    Names come from it too, and voxel size and shape where a table lacks them; a pick at another place
    than any of the side file keeps the score it has. Places are compared in voxels, or `in_angstrom`
    where that is what the file has, so that voxels of another size cost no score.
    """
    written = read_beside(path)
    if in_angstrom:
        return [_with_scores(table, [_in_voxels_of(table, one) for one in written], path) for table in tables]
    return [_with_scores(table, written, path) for table in tables]


def _in_voxels_of(table: Picks, one: Picks) -> Picks:
    if table.voxel_size is None or one.voxel_size is None:
        return one
    ratio = one.voxel_size / table.voxel_size
    shape = one.shape if abs(ratio - 1) < _SAME_SIZE else None
    return replace(one, zyx=one.zyx * ratio, shape=shape)


def _with_scores(table: Picks, written: Sequence[Picks], path: Path) -> Picks:
    named = [one for one in written if table.tomogram in (one.tomogram, _stem(path))]
    named = [one for one in named if table.particle == one.particle] or named
    if not named:
        return table
    ours, theirs = same_places(table.zyx, np.concatenate([one.zyx for one in named]))
    score = table.score.copy()
    score[ours] = np.concatenate([one.score for one in named])[theirs]
    which = np.repeat(np.arange(len(named)), [len(one) for one in named])[theirs]
    known = named[int(which[0])] if len(which) else named[0]
    # A format that has numbers for kinds has another name for this one.
    one_kind = len(named) == 1 or (len(which) > 0 and bool((which == which[0]).all()))
    return replace(
        table,
        score=score,
        tomogram=known.tomogram,
        particle=known.particle if one_kind else table.particle,
        voxel_size=table.voxel_size or known.voxel_size,
        shape=table.shape or known.shape,
    )


def _stem(path: Path) -> str:
    return path.name[: -len(path.suffix)] if path.suffix else path.name


def same_places(first: Points, second: Points, within: float = SAME_PLACE) -> tuple[Rows, Rows]:
    """Return the rows of two tables of points (n, 3) that are at the same place, each at most once.

    Two points are the same where each is the other's nearest and at most `within` voxels away on
    every axis. Of several at one place, the first of one table is the first of the other.
    """
    if not len(first) or not len(second):
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    if len(first) == len(second) and np.abs(first - second).max() <= within:  # nobody has edited anything
        return np.arange(len(first)), np.arange(len(first))
    one, other = _distinct(first, within), _distinct(second, within)
    apart, there = cKDTree(other).query(one, p=np.inf, distance_upper_bound=within * (1 + 1e-9))
    _, back = cKDTree(one).query(other, p=np.inf, distance_upper_bound=within * (1 + 1e-9))
    rows = np.flatnonzero(np.isfinite(apart))
    mutual = rows[back[there[rows]] == rows]
    return mutual, there[mutual]


def _distinct(points: Points, within: float) -> Points:
    """Return points with a fourth coordinate: how many rows before are at the same place, far apart."""
    places = np.round(points, 3)
    rows = np.lexsort(places.T)  # stable: of one place, the rows are in their order
    new = np.r_[True, (np.diff(places[rows], axis=0) != 0).any(axis=1)]
    starts = np.flatnonzero(new)[np.cumsum(new) - 1]
    before = np.empty(len(points))
    before[rows] = np.arange(len(points)) - starts
    return np.column_stack([points, before * 10 * within])
