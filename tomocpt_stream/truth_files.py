"""The picks of one tomogram out of a file that may have several tomograms, voxel sizes and kinds."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.errors import FormatError, SourceError
from tomocpt_stream.formats import read_kinds
from tomocpt_stream.formats.series_names import series_name
from tomocpt_stream.receipts import local_path
from tomocpt_stream.remote import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tomocpt_stream.picks import Picks
    from tomocpt_stream.tomogram import Tomogram

_SAME = 0.01  # 10 Å for 10.012


@dataclass(frozen=True)
class Tables:
    """What a file has of a tomogram: a table for each kind, in voxels of the tomogram's file.

    `names` are those of all tomograms in the file, `kinds` those of all particles in what was read;
    `listed` says whether the tomogram is one of the former.
    """

    own: tuple[Picks, ...]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    listed: bool


class TruthFiles:
    """Files of picks that several tomograms may share; each is read as it stands only once.

    `uses` are pairs of a file and what tells its tomogram from others. A file that only one tomogram uses
    and that has only one belongs to it, whatever it is called there; else names decide, as they are or as
    those of tilt series (`rec_TS_01_10.00Apx` is of TS_01).
    """

    def __init__(self, uses: Iterable[tuple[str | Path, object]]) -> None:
        users: dict[str, set[object]] = defaultdict(set)
        for path, user in uses:
            users[_key(path)].add(user)
        self._shared = {path for path, some in users.items() if len(some) > 1}
        self._alone: dict[str, list[Picks] | None] = {}

    def read(
        self,
        path: str | Path,
        tomogram: Tomogram,
        *,
        particle: str | None = None,
        own_voxels: bool = False,
    ) -> Tables:
        """Return what a file has of a tomogram; `particle` chooses the class of a STAR file.

        `own_voxels` says that coordinates count the tomogram's voxels, whatever size the file says. Raises
        FormatError where the file cannot be read, SourceError where it counts voxels of another size.
        """
        frame = tomogram.frame
        own_size = (frame.file_shape, frame.file_voxel_size)
        alone = self._as_it_stands(path)
        tables = alone or []
        if alone is None:  # it does not say all that is needed, and takes the tomogram's word
            tables = read_kinds(path, shape=own_size[0], voxel_size=own_size[1])
        names = tuple(sorted({table.tomogram for table in tables}))
        own = self._name(_key(path), tables, tomogram)
        if own is None:
            return Tables((), names, _kinds(tables), listed=False)
        # The word of this tomogram is not that of the others in the file.
        sizes: dict[str, Any] = dict.fromkeys(names, own_size)
        sizes |= {table.tomogram: table for table in alone or ()} | {own: own_size}
        tables = read_kinds(path, tomograms=sizes, particle=particle)
        chosen = tuple(table for table in tables if table.tomogram == own)
        if not own_voxels:
            _refuse_other_voxels(chosen, path, tomogram, particle, alone or [])
        return Tables(chosen, names, _kinds(tables), listed=True)

    def _as_it_stands(self, path: str | Path) -> list[Picks] | None:
        """Return the tables of a file by what it says alone; None where that is not enough."""
        key = _key(path)
        if key not in self._alone:
            try:
                self._alone[key] = [] if _is_empty(path) else read_kinds(path)
            except FormatError:
                self._alone[key] = None
        return self._alone[key]

    def _name(self, key: str, tables: list[Picks], tomogram: Tomogram) -> str | None:
        """Return what a file calls a tomogram; None where none of its tomograms is that one."""
        if any(table.tomogram == tomogram.name for table in tables):
            return tomogram.name
        names = {table.tomogram for table in tables}
        able = {table.tomogram for table in tables if _may_count(table, tomogram)}
        alike = {name for name in able if series_name(name) == series_name(tomogram.name)}
        if len(alike) == 1:
            return alike.pop()
        return able.pop() if len(names) == len(able) == 1 and key not in self._shared else None


def _key(path: str | Path) -> str:
    """Return one name for all spellings of a place."""
    return str(path) if is_remote(str(path)) else str(Path(local_path(path)).resolve())


def _is_empty(path: str | Path) -> bool:
    """Return whether a file has no byte, as one that a user made for a tomogram without a particle."""
    if is_remote(str(path)):
        return False
    place = Path(local_path(path))
    return place.is_file() and not place.stat().st_size


def _may_count(table: Picks, tomogram: Tomogram) -> bool:
    """Return whether picks that say no voxel size may be in a tomogram's voxels, by their tomogram's name.

    TS_1_10.00Apx and TS_1_5.00Apx are of one tilt series, and of two sizes.
    """
    said = re.search(r"_(\d+(?:\.\d+)?)Apx", table.tomogram)
    if table.voxel_size is not None or said is None:
        return True
    return math.isclose(float(said[1]), tomogram.frame.file_voxel_size, rel_tol=_SAME)


def same_voxels(picks: Picks, tomogram: Tomogram) -> Picks:
    """Return picks that are in voxels of the tomogram, or refuse them (SourceError)."""
    size, voxel_size = picks.voxel_size, tomogram.frame.file_voxel_size
    if size is not None and not math.isclose(size, voxel_size, rel_tol=_SAME):
        raise SourceError(
            f"picks in voxels of {size:g} Å of a tomogram with voxels of {voxel_size:g} Å",
            expected="picks in the voxels of the tomogram, or a file of picks in Å",
            remedy="give them in one of these, or say the tomogram's voxel_size if they count its voxels",
        )
    return picks


def _kinds(tables: Iterable[Picks]) -> tuple[str, ...]:
    return tuple(sorted({table.particle for table in tables}))


def _refuse_other_voxels(
    tables: Iterable[Picks], path: str | Path, tomogram: Tomogram, particle: str | None, alone: list[Picks]
) -> None:
    """Refuse a file that says that it counts voxels of another size; what it has in Å fits any tomogram."""
    voxel_size = tomogram.frame.file_voxel_size
    if all(
        one.voxel_size is None or math.isclose(one.voxel_size, voxel_size, rel_tol=_SAME) for one in alone
    ):
        return
    # By class again where one was asked for: rows are compared.
    again = alone if particle is None else read_kinds(path, particle=particle)
    said = {(one.tomogram, one.particle): one for one in again}
    for table in tables:
        own = said.get((table.tomogram, table.particle))
        if own is not None and len(own) and np.array_equal(own.zyx, table.zyx):
            same_voxels(own, tomogram)
