"""The table of picks of one tomogram: where the particles are, how sure, how turned."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from tomocpt_stream.errors import SourceError

if TYPE_CHECKING:
    from tomocpt_stream.frame import Points, Shape

Scores = npt.NDArray[np.float32]
Rotations = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_] | npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Picks:
    """The picks of one tomogram, best first unless a file gave them in another order.

    `zyx` is (n, 3), voxels of the source tomogram (level 0, the file's own axes), 0 = centre of the
    first voxel. `score` is (n,). `rotations` is (n, 3, 3) or None: each matrix turns a vector
    (x, y, z) of the particle into one of the tomogram. `voxel_size` is in Å and `shape` is z, y, x;
    both are None where nobody said. The arrays are copies and cannot be written to.

    Raises SourceError where shapes disagree or a coordinate is not finite.
    """

    zyx: Points
    score: Scores
    rotations: Rotations | None = None
    voxel_size: float | None = None
    tomogram: str = ""
    shape: Shape | None = None
    particle: str = ""

    def __post_init__(self) -> None:
        zyx = np.array(self.zyx, dtype=np.float64)
        zyx = zyx.reshape(0, 3) if zyx.size == 0 else zyx
        _freeze(self, "zyx", zyx, (len(zyx), 3))
        _freeze(self, "score", np.array(self.score, dtype=np.float32), (len(zyx),))
        if self.rotations is not None:
            rotations = np.array(self.rotations, dtype=np.float64)
            rotations = rotations.reshape(0, 3, 3) if rotations.size == 0 else rotations
            _freeze(self, "rotations", rotations, (len(zyx), 3, 3))
        if self.voxel_size is not None and not (np.isfinite(self.voxel_size) and self.voxel_size > 0):
            raise SourceError(
                f"picks of {self.tomogram or 'a tomogram'} with a voxel size of {self.voxel_size} Å",
                expected="a positive number",
                remedy="pass the voxel size of the tomogram in Å, or None where it is unknown",
            )
        if not np.isfinite(zyx).all():
            row = int(np.flatnonzero(~np.isfinite(zyx).all(axis=1))[0])
            raise SourceError(
                f"pick {row} of {self.tomogram or 'a tomogram'} at {zyx[row].tolist()} (z, y, x)",
                expected="finite coordinates",
                remedy="remove that pick",
            )

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild through the constructor, so that the arrays are read-only after pickling too."""
        return (Picks, tuple(getattr(self, field.name) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.zyx)

    def take(self, rows: Rows) -> Picks:
        """Return the picks of `rows` (a mask or indices), in that order."""
        rotations = None if self.rotations is None else self.rotations[rows]
        return replace(self, zyx=self.zyx[rows], score=self.score[rows], rotations=rotations)

    def above(self, threshold: float) -> Picks:
        """Return the picks whose score is strictly above `threshold` (rounded to float32)."""
        return self.take(self.score > np.float32(threshold))

    def angstrom(self) -> Points:
        """Return (n, 3) x, y, z in Å: index times voxel size, without a half voxel.

        Raises SourceError where the voxel size is unknown.
        """
        if self.voxel_size is None:
            raise SourceError(
                f"picks of {self.tomogram or 'an array'} without a voxel size",
                expected="the voxel size of their tomogram in Å",
                remedy="pass voxel_size= where they are read, or use dataclasses.replace",
            )
        return self.zyx[:, ::-1] * self.voxel_size

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row a pick: tomogram, particle, z, y, x (voxels), score.

        Where the picks have rotations, columns r00 to r22 follow: the matrix row by row.
        """
        columns: dict[str, object] = {"tomogram": self.tomogram, "particle": self.particle}
        columns |= dict(zip("zyx", self.zyx.T, strict=True))
        columns["score"] = self.score
        if self.rotations is not None:
            columns |= {f"r{i}{j}": self.rotations[:, i, j] for i in range(3) for j in range(3)}
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self)))


def _freeze(picks: Picks, name: str, array: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise SourceError(
            f"picks of {picks.tomogram or 'a tomogram'} with {name} of shape {array.shape}",
            expected=f"shape {shape}",
            remedy="give one row for each pick",
        )
    array.setflags(write=False)
    object.__setattr__(picks, name, array)
