"""RELION STAR files of picks: 3.0 and 3.1 in tomogram voxels, 5 in Å from the tomogram's centre.

"relion31"
    `rlnCoordinateX/Y/Z` are voxels of the tomogram, 0 at the centre of the first one, as Warp reads
    them too; `rlnImagePixelSize` of the row's optics group is their size in Å.
"relion5"
    `rlnCenteredCoordinateX/Y/ZAngst` = x·v − S·p/2, the centre that RELION 5's subtomogram
    extraction takes: S unbinned pixels of p Å as tomograms.star has them, N voxels of v Å without
    one. RELION's napari picker takes S/2 − 1 instead; its values are p Å larger.

Angles are ZYZ: the matrix from particle to tomogram is the inverse of Rz(rot)·Ry(tilt)·Rz(psi).
`rlnOrigin*` is subtracted from the position. Where RELION gives subtomograms an orientation of
their own (`rlnTomoSubtomogramRot/Tilt/Psi`), angles and origins are relative to it. The score is
`rlnAutopickFigureOfMerit`. Voltage and spherical aberration, which readers want but picks do not
know, are RELION's defaults in a "relion31" file; no coordinate depends on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.asked import Asked, lacking
from tomocpt_stream.formats.extents import Extent, extent
from tomocpt_stream.formats.relion import (
    ANGLES,
    COORDINATES,
    GROUP,
    NAME,
    ORIGIN_ANGSTROM,
    ORIGIN_VOXELS,
    OWN_ANGLES,
    SCORE,
    SERIES_SIZE,
    VOXEL_SIZE,
    Dialect,
    Floats,
    angles_of,
    matrices_of,
)
from tomocpt_stream.formats.tables import (
    Table,
    check_name,
    finite_column,
    name_column,
    read_tables,
    render_tables,
)
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_DEFAULTS = (("rlnSphericalAberration", 2.7), ("rlnVoltage", 300.0))
_WITHOUT_PICKS = re.compile(r"# tomogram (.+) has no picks, voxel size (\S+)$")


@dataclass(frozen=True)
class _Rows:
    """The columns of a table of particles as numbers, one row a particle; vectors are x, y, z."""

    dialect: Dialect
    place: str
    coordinates: Floats
    origins_angstrom: Floats
    origins_voxels: Floats
    rotations: Floats | None
    scores: Floats

    def picks(self, rows: npt.NDArray[np.intp], name: str, size: Extent) -> Picks:
        """Return the picks of some rows, which all lie in the tomogram `name`."""
        if size.voxel_size is None and (self.dialect == "relion5" or self.origins_angstrom[rows].any()):
            raise lacking(name, self.place, "voxel size", "voxel_size= in Å")
        shift = self.origins_angstrom[rows] / (size.voxel_size or 1.0)
        if self.dialect == "relion31":
            xyz = self.coordinates[rows] - self.origins_voxels[rows] - shift
        elif size.angstrom is None:
            raise lacking(name, self.place, "size", "shape= (z, y, x)")
        else:
            xyz = (self.coordinates[rows] + size.angstrom / 2) / (size.voxel_size or 1.0) - shift
        return Picks(
            zyx=xyz[:, ::-1],
            score=self.scores[rows].astype(np.float32),
            rotations=None if self.rotations is None else self.rotations[rows],
            voxel_size=size.voxel_size,
            tomogram=name,
            shape=size.shape,
        )


def read(path: Path, dialect: Dialect | None, asked: Asked) -> dict[str, Picks]:
    """Return the picks of a RELION STAR file by tomogram name; without `dialect` its columns tell.

    Raises FormatError where it cannot be read, or needs a size that was not passed.
    """
    tables = read_tables(path)
    particles, spoken = _particles(tables, path, dialect)
    if dialect is None and spoken == "relion31":
        _refuse_tilt_series(particles, tables)
    said = _said_sizes(particles, tables, spoken)
    columns = _columns(particles, spoken)
    found = {}
    for name, rows in _by_name(name_column(particles, ["rlnTomoName", "rlnMicrographName"])).items():
        known = asked.listed(name) if spoken == "relion5" else name
        found[name] = columns.picks(rows, name, asked.of(known, _one_size(said[rows], name, particles)))
    for name, said_size in _without_picks(path).items():
        size = asked.of(name, said_size)
        empty = Picks(np.zeros((0, 3)), np.zeros(0, np.float32), None, size.voxel_size, name, size.shape)
        found.setdefault(name, empty)
    return found


def render(picks: Sequence[Picks], dialect: Dialect, asked: Asked, name: str) -> dict[str, bytes]:
    """Return a RELION STAR file called `name` with the picks of some tomograms.

    Raises FormatError where a tomogram lacks its name, its voxel size or, for "relion5", its size.
    """
    named = [_sized(table, dialect, asked) for table in picks]
    _refuse_two_sizes(named)
    optics, groups = _optics([size for _, size in named], dialect)
    full = [(table, size, group) for (table, size), group in zip(named, groups, strict=True) if len(table)]
    oriented = [table.tomogram for table, *_ in full if table.rotations is not None]
    if oriented and len(oriented) < len(full):
        raise FormatError(
            f"picks with rotations (in {oriented[0]}) beside picks without",
            expected="rotations for all picks of a file, or for none",
            remedy="write them to two files, or drop the rotations",
        )
    rows = [_rows(table, size, dialect) for table, size, _ in full]
    particles = pd.concat(rows, ignore_index=True) if rows else _no_rows(dialect)
    blocks = {"particles": particles}
    if optics is not None:
        repeats = [np.full(len(table), str(group)) for table, _, group in full]
        particles[GROUP] = np.concatenate([np.zeros(0, dtype="U1"), *repeats])
        blocks = {"optics": optics, **blocks}
    comments = ["version 30001" if dialect == "relion31" else "version 50001"]
    comments += [
        f"tomogram {table.tomogram} has no picks, voxel size {size.voxel_size!r}"
        for table, size in named
        if not len(table)
    ]
    return {name: render_tables(blocks, comments).encode()}


def _particles(tables: Mapping[str, Table], path: Path, dialect: Dialect | None) -> tuple[Table, Dialect]:
    """Return the table of particles and the dialect of its columns."""
    found = [
        (name, spoken)
        for spoken, columns in COORDINATES.items()
        for name, table in tables.items()
        if set(columns) <= set(table.frame) and dialect in (None, spoken)
    ]
    chosen = [pair for pair in found if pair[0] == "particles"] or found
    if len({name for name, _ in chosen}) != 1:
        columns = [", ".join(columns) for spoken, columns in COORDINATES.items() if dialect in (None, spoken)]
        raise FormatError(
            f"{path} has {len(chosen)} tables of picks among {len(tables)} readable ones",
            expected=f"one with the columns {' or '.join(columns)}, or one of them named data_particles",
            remedy="check that it is a file of particles, in UTF-8 text, and its format",
        )
    return tables[chosen[0][0]], chosen[0][1]


def _refuse_tilt_series(particles: Table, tables: Mapping[str, Table]) -> None:
    optics = tables.get("optics")
    if optics is not None and SERIES_SIZE in optics.frame and "rlnTomoName" in particles.frame:
        raise FormatError(
            f"{particles.place} has rlnCoordinateX beside {SERIES_SIZE}: RELION 4 means pixels of the tilt "
            "series there, Warp pixels of its export",
            expected="coordinates whose voxels are known",
            remedy='if they are voxels of the tomogram, pass format="relion31" and voxel_size=',
        )


def _columns(particles: Table, dialect: Dialect) -> _Rows:
    def vectors(columns: list[str]) -> Floats:
        if not set(columns) <= set(particles.frame):
            return np.zeros((len(particles.frame), 3))
        return np.stack([finite_column(particles, column) for column in columns], axis=1)

    def matrices(columns: list[str]) -> Floats | None:
        return matrices_of(vectors(columns)) if set(columns) <= set(particles.frame) else None

    rotations, own = matrices(ANGLES), matrices(OWN_ANGLES)
    origins = vectors(ORIGIN_ANGSTROM)
    if own is not None:
        origins = np.einsum("nij,nj->ni", own, origins)
        rotations = own if rotations is None else own @ rotations
    angstrom = set(ORIGIN_ANGSTROM) <= set(particles.frame)
    return _Rows(
        dialect=dialect,
        place=particles.place,
        coordinates=vectors(COORDINATES[dialect]),
        origins_angstrom=origins,
        origins_voxels=np.zeros_like(origins) if angstrom else vectors(ORIGIN_VOXELS),
        rotations=rotations,
        scores=finite_column(particles, SCORE) if SCORE in particles.frame else np.ones(len(origins)),
    )


def _said_sizes(particles: Table, tables: Mapping[str, Table], dialect: Dialect) -> Floats:
    """Return the voxel size that the file says for each row; NaN where it says none."""
    unknown = np.full(len(particles.frame), np.nan)
    if dialect == "relion5":  # its rlnImagePixelSize is that of extracted subtomograms
        return unknown
    optics = tables.get("optics")
    if optics is None or VOXEL_SIZE not in optics.frame:
        own = next((column for column in (VOXEL_SIZE, "rlnPixelSize") if column in particles.frame), None)
        return unknown if own is None else finite_column(particles, own)
    sizes = finite_column(optics, VOXEL_SIZE)
    if GROUP not in particles.frame or GROUP not in optics.frame:
        return np.full(len(unknown), sizes[0]) if len(sizes) == 1 else unknown
    by_group = dict(zip(finite_column(optics, GROUP), sizes, strict=True))
    groups = finite_column(particles, GROUP)
    strange = np.flatnonzero(~np.isin(groups, list(by_group)))
    if len(strange):
        raise FormatError(
            f"row {strange[0] + 1} of {particles.place} is of optics group {groups[strange[0]]:g}",
            expected=f"one of the groups in data_optics: {', '.join(f'{g:g}' for g in by_group)}",
            remedy="correct the row, or add the group",
        )
    return np.asarray([by_group[group] for group in groups], dtype=np.float64)


def _one_size(sizes: Floats, name: str, particles: Table) -> float | None:
    distinct = np.unique(sizes[np.isfinite(sizes) & (sizes > 0)])
    if len(distinct) > 1:
        sizes_found = ", ".join(f"{size:g}" for size in distinct)
        raise FormatError(
            f"{particles.place} gives tomogram {name} the voxel sizes {sizes_found}",
            expected="one voxel size for each tomogram",
            remedy="pass voxel_size= if they are all in the same voxels",
        )
    return float(distinct[0]) if len(distinct) else None


def _by_name(names: npt.NDArray[np.str_]) -> dict[str, npt.NDArray[np.intp]]:
    """Return the rows of each name, in their order, names as they first come."""
    codes, distinct = pd.factorize(names)
    rows = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[rows], np.arange(len(distinct) + 1))
    return {str(name): rows[ends[i] : ends[i + 1]] for i, name in enumerate(distinct)}


def _without_picks(path: Path) -> dict[str, float | None]:
    """Return the tomograms that a file of ours names before its tables, with their voxel sizes."""
    found: dict[str, float | None] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("data_"):
                break
            match = _WITHOUT_PICKS.match(line.rstrip())
            if match:
                size = pd.to_numeric(match[2], errors="coerce")
                found[match[1]] = float(size) if size > 0 else None
    return found


def _sized(table: Picks, dialect: Dialect, asked: Asked) -> tuple[Picks, Extent]:
    """Return picks under the name they are written with, and the size of their tomogram."""
    name = check_name(table.tomogram)
    if dialect == "relion5":
        asked.listed(name)
    name, known = asked.known(name) or (name, Extent())
    voxel_size = table.voxel_size or known.voxel_size
    if voxel_size is None:
        raise lacking(name, "the table of picks", "voxel size", "picks with a voxel_size")
    size = replace(known, voxel_size=voxel_size)
    if known.angstrom is None:
        size = extent(table.shape or known.shape, voxel_size)
    if dialect == "relion5" and size.angstrom is None:
        raise lacking(name, "the table of picks", "size", "picks with a shape")
    return replace(table, tomogram=name), size


def _refuse_two_sizes(named: Sequence[tuple[Picks, Extent]]) -> None:
    sizes: dict[str, float | None] = {}
    for table, size in named:
        if sizes.setdefault(table.tomogram, size.voxel_size) != size.voxel_size:
            raise FormatError(
                f"picks of tomogram {table.tomogram} in voxels of {sizes[table.tomogram]} and of "
                f"{size.voxel_size} Å",
                expected="one voxel size for each tomogram",
                remedy="write them to two files",
            )


def _optics(sizes: Sequence[Extent], dialect: Dialect) -> tuple[pd.DataFrame | None, list[int]]:
    """Return the table of optics groups, one for each pixel size, and the group of each tomogram.

    Without a tomograms.star a "relion5" file has none, like RELION's own files of picks.
    """
    kinds: list[tuple[tuple[str, float | None], ...]]
    if dialect == "relion31":
        kinds = [(*_DEFAULTS, (VOXEL_SIZE, size.voxel_size), ("rlnImageDimensionality", 3)) for size in sizes]
    elif sizes and all(size.pixel_size is not None for size in sizes):
        kinds = [(*size.optics, (SERIES_SIZE, size.pixel_size)) for size in sizes]
    else:
        return None, [0] * len(sizes)
    distinct = list(dict.fromkeys(kinds))
    rows = [
        {GROUP: str(i), "rlnOpticsGroupName": f"opticsGroup{i}", **{key: repr(value) for key, value in kind}}
        for i, kind in enumerate(distinct, start=1)
    ]
    return pd.DataFrame(rows), [distinct.index(kind) + 1 for kind in kinds]


def _rows(table: Picks, size: Extent, dialect: Dialect) -> pd.DataFrame:
    """Return the rows of some picks as text; never the name first, which could look like a block."""
    xyz = table.zyx[:, ::-1]
    if size.angstrom is not None and dialect == "relion5":
        xyz = xyz * (size.voxel_size or 1.0) - size.angstrom / 2
    columns = dict(zip(COORDINATES[dialect], np.char.mod("%.6f", xyz).T, strict=True))
    if table.rotations is not None:
        columns |= dict(zip(ANGLES, np.char.mod("%.6f", angles_of(table.rotations)).T, strict=True))
    columns[NAME[dialect]] = np.full(len(table), table.tomogram)
    columns[SCORE] = np.char.mod("%.6g", table.score)
    return pd.DataFrame(columns)


def _no_rows(dialect: Dialect) -> pd.DataFrame:
    return pd.DataFrame({name: [] for name in [*COORDINATES[dialect], NAME[dialect], SCORE]}, dtype=str)
