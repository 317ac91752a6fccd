"""Picks that somebody edited in napari or IMOD: what was kept, what was added, what was taken away.

A pick is told by its place, not by its row or its features, because programs that edit points give
new ones whatever features they have at hand. A pick that was moved by more than 0.01 voxel along an axis
is one removed and one added.

A curated table (.csv) is our own table of `formats.csv_tables` with one more column, `mark`: picked, manual
or removed. `read_picks` takes it as it takes any other and leaves the removed ones out, so that it serves
as labels for training, a tomogram of which all were removed as one without particles; `read_curated`
gives the marks too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.asked import Asked
from tomocpt_stream.formats.csv_tables import MANUAL, PICKED, REMOVED, own_dialect, own_table, read_table
from tomocpt_stream.formats.delimited import read_head
from tomocpt_stream.formats.side import SAME_PLACE, same_places
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tomocpt_stream.picks import Picks


@dataclass(frozen=True, eq=False)
class Curated:
    """The picks of one tomogram after somebody looked at them.

    `picks` are those that are there now; `manual` (n,) says which of them a person put there: their score
    is 1. `removed` are those that a person took away, with the scores that they had.
    """

    picks: Picks
    manual: npt.NDArray[np.bool_]
    removed: Picks

    def __str__(self) -> str:
        added = int(np.count_nonzero(self.manual))
        kept, removed = len(self.picks) - added, len(self.removed)
        return f"{self.picks.tomogram}: {kept} kept, {added} added, {removed} removed"


def curate(written: Picks, edited: Picks, *, within: float = SAME_PLACE) -> Curated:
    """Compare picks as they were `written` with the same ones as they were read back after editing.

    A pick is kept where each of two is the other's nearest and at most `within` voxels away along every
    axis; it keeps the written score, place and rotation. Added ones have score 1, and, where the others
    have rotations, that of the edited table or else none of all picks has any.

    Raises
    ------
    FormatError
        The two tables are of different voxel sizes.
    """
    sizes = (written.voxel_size, edited.voxel_size)
    if None not in sizes and not np.isclose(sizes[0] or 0, sizes[1] or 0, rtol=1e-4):
        raise FormatError(
            f"picks written in voxels of {sizes[0]} Å and edited in voxels of {sizes[1]} Å",
            expected="one voxel size",
            remedy="read the edited picks with the voxel_size of those that were written",
        )
    now, before = same_places(edited.zyx, written.zyx, within)
    manual = np.ones(len(edited), dtype=bool)
    manual[now] = False
    zyx, score = edited.zyx.copy(), np.ones(len(edited), np.float32)
    zyx[now], score[now] = written.zyx[before], written.score[before]
    gone = np.ones(len(written), dtype=bool)
    gone[before] = False
    picks = replace(
        written, zyx=zyx, score=score, rotations=_rotations(written, edited, now, before), shape=written.shape
    )
    return Curated(picks, manual, written.take(gone))


def write_curated(curated: Curated | Iterable[Curated], path: str | Path) -> None:
    """Write curated picks as a table with marks; kept ones first, then added, then removed ones."""
    tables, marks = [], []
    for one in [curated] if isinstance(curated, Curated) else curated:
        parts = (one.picks.take(~one.manual), one.picks.take(one.manual), one.removed)
        nothing = not any(map(len, parts))
        for table, mark in zip(parts, (PICKED, MANUAL, REMOVED), strict=True):
            if len(table) or (nothing and mark == PICKED):  # a tomogram without particles is a label too
                tables.append(table)
                marks.append(mark)
    write_whole(Path(path), own_table(tables, ",", marks))


def read_curated(path: str | Path) -> list[Curated]:
    """Read a table with marks: a Curated for each tomogram and kind of particle.

    Raises FormatError where it is no table of ours, or has no marks or other ones.
    """
    path = Path(path)
    head = read_head(path)
    dialect = own_dialect(head)
    if dialect is None or dialect.mark is None:
        raise FormatError(
            f"the first line of {path} is {','.join(head.cells)[:120]!r}",
            expected="a curated table: x [voxel], y [voxel], z [voxel] and mark among its columns",
            remedy="write it with write_curated; picks without marks are read by read_picks",
        )
    found: dict[tuple[str, str], dict[str, Picks]] = {}
    for mark in (PICKED, MANUAL, REMOVED):
        for table in read_table(path, head, dialect, Asked(), marked=mark):
            found.setdefault((table.tomogram, table.particle), {})[mark] = table
    return [_joined(parts) for parts in found.values()]


def _joined(parts: dict[str, Picks]) -> Curated:
    some = next(iter(parts.values()))
    nothing = replace(some, zyx=np.zeros((0, 3)), score=np.zeros(0, np.float32), rotations=None)
    kept, added = parts.get(PICKED, nothing), parts.get(MANUAL, nothing)
    full = [table.rotations for table in (kept, added) if len(table)]
    turned = [matrices for matrices in full if matrices is not None]
    picks = replace(
        some,
        zyx=np.concatenate([kept.zyx, added.zyx]),
        score=np.concatenate([kept.score, added.score]),
        rotations=np.concatenate(turned) if turned and len(turned) == len(full) else None,
    )
    return Curated(picks, np.arange(len(picks)) >= len(kept), parts.get(REMOVED, nothing))


def _rotations(
    written: Picks, edited: Picks, now: npt.NDArray[np.intp], before: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64] | None:
    if written.rotations is None:
        return edited.rotations
    if edited.rotations is None and len(now) < len(edited):
        return None
    rotations = (
        np.tile(np.eye(3), (len(edited), 1, 1)) if edited.rotations is None else edited.rotations.copy()
    )
    rotations[now] = written.rotations[before]
    return rotations
