"""Rows of points, of many tomograms and kinds of particles in any order, as tables of picks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.asked import lacking
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.formats.delimited import Codes, Floats, Names

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Gathered:
    """Points of one file, a row each: positions (n, 3) as x, y, z in voxels or, `in_angstrom`, in Å.

    `voxel_sizes` (n,) in Å and `sizes` (n, 3), x, y, z in voxels, have NaN where the file says none;
    `rotations` (n, 9) has NaN where a pick has none. Rows without a position are tomograms without picks.
    """

    place: str
    tomograms: Names
    particles: Names
    xyz: Floats
    scores: Floats
    lines: Codes
    in_angstrom: bool = False
    rotations: Floats | None = None
    voxel_sizes: Floats | None = None
    sizes: Floats | None = None

    def tables(self, asked: Asked) -> list[Picks]:
        """Return the picks of each tomogram and kind, tomograms and rows in their order."""
        if not len(self.xyz):
            nothing = np.zeros(0, np.int64)
            return [self._table(nothing, one, 0, asked) for one in range(len(self.tomograms.distinct))]
        kinds = len(self.particles.distinct) or 1
        both = self.tomograms.codes * kinds + self.particles.codes
        distinct, first, group = np.unique(both, return_index=True, return_inverse=True)
        rows = np.argsort(group, kind="stable")
        ends = np.searchsorted(group[rows], np.arange(len(distinct) + 1))
        return [
            self._table(
                rows[ends[i] : ends[i + 1]], int(distinct[i]) // kinds, int(distinct[i]) % kinds, asked
            )
            for i in np.argsort(first, kind="stable")
        ]

    def _table(self, rows: Codes, tomogram: int, particle: int, asked: Asked) -> Picks:
        name = self.tomograms.distinct[tomogram]
        size = asked.of(name, self._said(self.voxel_sizes, rows, name, "voxel size"))
        shape, said = size.shape, self._size(rows, name)
        if shape is None and said is not None:
            shape = said
        rows = rows[~np.isnan(self.xyz[rows]).all(axis=1)]
        xyz = self.xyz[rows]
        if self.in_angstrom:
            if size.voxel_size is None:
                raise lacking(name, self.place, "voxel size", "voxel_size= (--voxel-size) in Å")
            xyz = xyz / size.voxel_size
        return Picks(
            zyx=xyz[:, ::-1],
            score=self.scores[rows].astype(np.float32),
            rotations=self._turned(rows),
            voxel_size=size.voxel_size,
            tomogram=name,
            shape=shape,
            particle=self.particles.distinct[particle] if self.particles.distinct else "",
        )

    def _said(self, column: Floats | None, rows: Codes, name: str, what: str) -> float | None:
        if column is None:
            return None
        found = np.unique(column[rows][np.isfinite(column[rows])])
        if len(found) > 1:
            several = ", ".join(f"{one:g}" for one in found[:5])
            raise FormatError(
                f"{self.place} gives tomogram {name} the {what}s {several}",
                expected=f"one {what} for each tomogram",
                remedy="correct the column",
            )
        if len(found) and not found[0] > 0:
            raise FormatError(
                f"{self.place} gives tomogram {name} the {what} {found[0]:g}",
                expected="a positive number",
                remedy="correct the column, or leave it empty",
            )
        return float(found[0]) if len(found) else None

    def _size(self, rows: Codes, name: str) -> tuple[int, int, int] | None:
        if self.sizes is None:
            return None
        x, y, z = (
            self._said(self.sizes[:, axis], rows, name, f"size along {'xyz'[axis]}") for axis in range(3)
        )
        return None if x is None or y is None or z is None else (int(z), int(y), int(x))

    def _turned(self, rows: Codes) -> Floats | None:
        """Return the rotations of rows, None where they have none; some without are an error."""
        if self.rotations is None or not len(rows) or np.isnan(self.rotations[rows]).all():
            return None
        matrices = self.rotations[rows].reshape(-1, 3, 3)
        wrong = np.flatnonzero(~are_rotations(matrices))
        if len(wrong):
            raise FormatError(
                f"line {self.lines[rows[wrong[0]]]} of {self.place} has r00 to r22 that are no rotation",
                expected="an orthogonal matrix of determinant 1 in every row of a tomogram, or in none",
                remedy="correct that line",
            )
        return matrices


def are_rotations(matrices: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which of (n, 3, 3) matrices turn and do nothing else, to 1e-3."""
    small = np.asarray((np.abs(matrices) < 2).all(axis=(1, 2)))
    safe = np.where(small[:, None, None], matrices, 0)
    off = np.abs(safe @ safe.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2), initial=0)
    turns: np.ndarray[tuple[int], np.dtype[np.bool_]] = (off <= TOLERANCE) & (np.linalg.det(safe) > 0)
    return turns
