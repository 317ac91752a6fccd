"""STAR files of picks in the dialects of RELION, Warp, M, STOPGAP and TOMOMAN.

"relion31", "relion30"
    `rlnCoordinateX/Y/Z` are voxels of the tomogram, 0 at the centre of the first one;
    `rlnImagePixelSize` of the row's optics group is their size in Å. RELION 3.0 has no optics groups,
    and its `rlnDetectorPixelSize` (µm at the detector) says nothing of tomograms: pass voxel_size=.
"relion4"
    The same columns beside `rlnTomoName`, in unbinned pixels of the tilt series (x·v/p), not centred.
    RELION 4.0 itself adds one such pixel to each when it reads them; RELION 5 does not, nor does this.
"relion5"
    `rlnCenteredCoordinateX/Y/ZAngst` = x·v − S·p/2, the centre that RELION 5's subtomogram
    extraction takes: S unbinned pixels of p Å as tomograms.star has them, N voxels of v Å without one.
"relion5-picker"
    The same with S/2 − 1 for S/2, as RELION's own napari picker writes: values are p Å larger.
"warp"
    What WarpTools ts_export_particles reads with --coords_angpix v: voxels, 0 at the centre of the first
    one; `rlnMicrographName` is that of a tomostar. All of a file have one voxel size.
"m" (read)
    `wrpCoordinateX1/Y1/Z1`, Å from the centre of the first voxel, where the particle was first.
"stopgap" (read)
    `orig_x/y/z` plus `x/y/z_shift` in voxels, counted from 0 or 1: base_index= says which. Tomograms are
    numbers. The matrix from particle to tomogram is Rz(psi)·Rx(the)·Rz(phi), the score is `score`.
"tomoman" (read)
    TOMOMAN's list for RELION: like "relion30" with `rlnTomoName`; `rlnPixelSize` is the voxels' size.

Elsewhere angles are ZYZ: the matrix from particle to tomogram is the inverse of Rz(rot)·Ry(tilt)·Rz(psi).
`rlnOrigin*` is subtracted from the position. Where RELION gives subtomograms an orientation of their own
(`rlnTomoSubtomogramRot/Tilt/Psi`), angles and origins are relative to it. The score is
`rlnAutopickFigureOfMerit`. `rlnClassNumber` is a kind of particle for who asks for that number; else it
may tell states of one, and all are read. Dialects but "relion30", "relion31" and "stopgap" name tilt
series. Files written here say their dialect in a comment; of others the columns tell, or an error asks. A
plain list of `rlnTomoName` and `rlnCoordinateX/Y/Z` is read as "relion31", and refused where a pick lies
beyond the tomogram. Voltage and spherical aberration, which readers want but picks do not know, are
RELION's defaults in a "relion31" file; no coordinate depends on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.asked import Asked, lacking
from tomocpt_stream.formats.places import Places
from tomocpt_stream.formats.relion import (
    CLASS,
    DIALECTS,
    GROUP,
    NAMES,
    NUMBERS,
    ORIGIN_ANGSTROM,
    ORIGIN_PIXELS,
    OWN_ANGLES,
    OWN_VOXEL_SIZE,
    SERIES_SIZE,
    VOXEL_SIZE,
    Dialect,
    Floats,
    matrices_of,
)
from tomocpt_stream.formats.star_files import render
from tomocpt_stream.formats.tables import Table, comments, finite_column, name_column, read_tables
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["read", "render"]

_WITHOUT_PICKS = re.compile(r"tomogram (.+) has no picks, voxel size (\S+)$")
_RELION_4 = {"rlnTomoParticleId", "rlnTomoParticleName", "rlnTomoManifoldIndex"}
_SPOKEN = re.compile(r"picks in the frame of (\S+?)(?:, voxel size (\S+))?$")


@dataclass(frozen=True)
class _Rows:
    """The columns of a table of particles as numbers, one row a particle; vectors are x, y, z."""

    coordinates: Floats
    origins_angstrom: Floats
    origins_pixels: Floats
    rotations: Floats | None
    scores: Floats


def read(path: Path, dialect: str | None, asked: Asked) -> dict[str, Picks]:
    """Return the picks of a STAR file by tomogram name; without `dialect` its columns tell it.

    Raises FormatError where it cannot be read, may be of several dialects, or needs a size or a choice
    that was not passed.
    """
    tables = read_tables(path, NUMBERS, NAMES)
    written, voxel_size, empty = _commented(path)
    particles, spoken = _particles(tables, path, dialect or written)
    guessed = not (dialect or written) and spoken == "relion31" and "rlnTomoName" in particles.columns
    rows = _columns(particles, DIALECTS[spoken], asked)
    codes, names = name_column(particles, DIALECTS[spoken].names)
    frame = DIALECTS[spoken].frame
    called = asked.names([*names, *empty], series=False, needed=frame == "centred" and bool(names))
    places = Places(DIALECTS[spoken], asked, particles.place)
    said = _said_sizes(particles, tables, spoken)
    wanted = _of_class(particles, asked.particle)
    found = {}
    for name, some in zip(names, _by_code(codes, len(names)), strict=True):
        own = _one_size(said[some], name, particles) or voxel_size
        kept = some if wanted is None else some[wanted[some]]
        if wanted is None or len(kept):
            found[called[name]] = _picks(rows, kept, called[name], places, own, guessed=guessed)
    if wanted is not None:
        return {name: replace(table, particle=asked.particle or "") for name, table in found.items()}
    for name, said_size in empty.items():
        size = asked.of(called[name], said_size)
        none = Picks(
            np.zeros((0, 3)), np.zeros(0, np.float32), None, size.voxel_size, called[name], size.shape
        )
        found.setdefault(called[name], none)
    return found


def _picks(
    rows: _Rows,
    some: npt.NDArray[np.intp],
    name: str,
    places: Places,
    said: float | None,
    *,
    guessed: bool,
) -> Picks:
    """Return the picks of some rows, which all lie in the tomogram `name`.

    Where the dialect was guessed, a pick beyond the tomogram shows that the guess was wrong.
    """
    counts_voxels = places.dialect.frame in ("tomogram", "export")
    size = places.asked.of(name, said if counts_voxels else None)
    place = places.of(name, size, said)
    angstrom = rows.origins_angstrom[some]
    if place.said is None and angstrom.any():
        raise lacking(name, places.where, "voxel size", "voxel_size= (--voxel-size) in Å")
    xyz = place.voxels(rows.coordinates[some] - rows.origins_pixels[some]) - angstrom / place.voxel
    if guessed and size.shape is not None and (xyz > size.shape[::-1]).any():
        beyond = int(np.flatnonzero((xyz > size.shape[::-1]).any(axis=1))[0])
        raise FormatError(
            f"{places.where} has a pick of tomogram {name} at x, y, z {xyz[beyond].round(1).tolist()}, "
            f"beyond its {size.shape} voxels (z, y, x)",
            expected="voxels of the tomogram, or a word on what the coordinates count",
            remedy='pass format= (--from): "relion4" for unbinned pixels of the tilt series, "relion31" for '
            "voxels that may lie outside",
        )
    return Picks(
        zyx=xyz[:, ::-1],
        score=rows.scores[some].astype(np.float32),
        rotations=None if rows.rotations is None else rows.rotations[some],
        voxel_size=place.said,
        tomogram=name,
        shape=size.shape,
    )


def _commented(path: Path) -> tuple[str | None, float | None, dict[str, float | None]]:
    """Return what a file of ours says before its tables: dialect, voxel size, tomograms without picks."""
    dialect, voxel_size, empty = None, None, {}
    for comment in comments(path):
        if (found := _SPOKEN.match(comment)) and found[1] in DIALECTS:
            dialect, voxel_size = found[1], _positive(found[2])
        if found := _WITHOUT_PICKS.match(comment):
            empty[found[1]] = _positive(found[2])
    return dialect, voxel_size, empty


def _positive(text: str | None) -> float | None:
    try:
        size = float(text or "nan")
    except ValueError:
        return None
    return size if np.isfinite(size) and size > 0 else None


def _particles(tables: Mapping[str, Table], path: Path, dialect: str | None) -> tuple[Table, str]:
    """Return the table of particles and the dialect that it is in."""
    triples = [DIALECTS[dialect].coordinates] if dialect is not None else _triples()
    found = [
        (name, triple)
        for triple in triples
        for name, table in tables.items()
        if set(triple) <= set(table.columns)
    ]
    chosen = [pair for pair in found if pair[0] == "particles"] or found
    if len({name for name, _ in chosen}) != 1:
        raise FormatError(
            f"{path} has {len(chosen)} tables of picks among {len(tables)} readable ones",
            expected=f"one with {' or '.join(map(', '.join, triples))}, or one named data_particles",
            remedy="check that it is a file of particles, in UTF-8 text, and its format",
        )
    name, triple = chosen[0]
    return tables[name], dialect or _dialect_of(tables[name], triple, tables)


def _triples() -> list[tuple[str, str, str]]:
    """Return the columns of coordinates, those first that mean more than others beside them."""
    triples = list(dict.fromkeys(one.coordinates for one in DIALECTS.values()))
    return sorted(triples, key=lambda triple: triple == DIALECTS["relion31"].coordinates)


def _dialect_of(particles: Table, triple: tuple[str, str, str], tables: Mapping[str, Table]) -> str:
    """Return the first dialect that has these columns, unless they are those of several programs."""
    if triple != DIALECTS["relion31"].coordinates:
        return next(name for name, one in DIALECTS.items() if one.coordinates == triple)
    if "rlnTomoName" not in particles.columns:
        return "relion31" if "optics" in tables else "relion30"
    if "rlnTomoNumber" in particles.columns and "optics" not in tables:
        return "tomoman"
    if "optics" not in tables and not _RELION_4.intersection(particles.columns):
        return "relion31"  # a plain list; voxels is what STAR means here when nobody says more
    raise FormatError(
        f"{particles.place} has rlnCoordinateX beside rlnTomoName: RELION 4 means pixels of the tilt series "
        "there, Warp voxels of its export, other programs voxels of the tomogram",
        expected="coordinates of which it is known what they count",
        remedy='pass format= (--from): "relion4" for unbinned pixels of the tilt series, "warp" for what '
        'Warp wrote, "relion31" for voxels of the tomogram',
    )


def _columns(particles: Table, dialect: Dialect, asked: Asked) -> _Rows:
    def vectors(columns: Sequence[str]) -> Floats:
        if not set(columns) <= set(particles.columns):
            return np.zeros((particles.rows, 3))
        return np.stack([finite_column(particles, column) for column in columns], axis=1)

    coordinates = vectors(dialect.coordinates)
    origins, pixels = np.zeros_like(coordinates), np.zeros_like(coordinates)
    if dialect.convention == "stopgap":
        coordinates = coordinates - _base_index(particles, asked)
    angstrom = set(ORIGIN_ANGSTROM) <= set(particles.columns)
    if dialect.shift is not None:
        pixels = -vectors(dialect.shift)
    elif angstrom:
        origins = vectors(ORIGIN_ANGSTROM)
    else:
        pixels = vectors(ORIGIN_PIXELS)
    turned = set(dialect.angles) <= set(particles.columns)
    rotations = (
        matrices_of(vectors(dialect.angles), dialect.convention) if turned and particles.rows else None
    )
    if set(OWN_ANGLES) <= set(particles.columns) and particles.rows:
        own = matrices_of(vectors(OWN_ANGLES))
        origins = np.einsum("nij,nj->ni", own, origins)
        rotations = own if rotations is None else own @ rotations
    scored = dialect.score in particles.columns
    scores = finite_column(particles, dialect.score) if scored else np.ones(particles.rows)
    return _Rows(coordinates, origins, pixels, rotations, scores)


def _of_class(particles: Table, particle: str | None) -> npt.NDArray[np.bool_] | None:
    """Return which rows are of a class; None where its name is no number or the table has no classes."""
    if particle is None or not (particle.isascii() and particle.isdigit()):
        return None
    if CLASS not in particles.columns or not particles.rows:
        return None
    classes = finite_column(particles, CLASS)
    wanted = np.asarray(classes == float(particle))
    if not wanted.any():
        raise FormatError(
            f"{particles.place} has no particle of class {particle}",
            expected=f"one of its classes: {', '.join(f'{one:g}' for one in np.unique(classes)[:20])}",
            remedy="choose one of them, or leave particle= (--particle) out",
        )
    return wanted


def _base_index(particles: Table, asked: Asked) -> int:
    if asked.base_index not in (0, 1):
        raise FormatError(
            f"{particles.place} does not say whether its first voxel is 0 or 1",
            expected="base_index=1 where STOPGAP extracted from it, 0 where a program wrote indices from 0",
            remedy="pass base_index= (--base-index)",
        )
    return asked.base_index


def _said_sizes(particles: Table, tables: Mapping[str, Table], spoken: str) -> Floats:
    """Return the size in Å that the file says for the pixels of each row; NaN where it says none.

    That is what coordinates count, or the tilt series' pixels. Of RELION 5 only the latter is asked:
    its rlnImagePixelSize is that of extracted subtomograms.
    """
    frame = DIALECTS[spoken].frame
    unknown = np.full(particles.rows, np.nan)
    if frame == "angstrom" or DIALECTS[spoken].convention == "stopgap":
        return unknown
    wanted = VOXEL_SIZE if frame in ("tomogram", "export") else SERIES_SIZE
    optics = tables.get("optics")
    if optics is None or wanted not in optics.columns or spoken == "relion30":
        own = [wanted, OWN_VOXEL_SIZE] if wanted == VOXEL_SIZE else [wanted]
        column = next((column for column in own if column in particles.columns), None)
        return unknown if column is None else finite_column(particles, column)
    sizes = finite_column(optics, wanted)
    if GROUP not in particles.columns or GROUP not in optics.columns:
        return np.full(len(unknown), sizes[0]) if len(sizes) == 1 else unknown
    by_group = dict(zip(finite_column(optics, GROUP), sizes, strict=True))
    groups = finite_column(particles, GROUP)
    distinct, inverse = np.unique(groups, return_inverse=True)
    strange = [group for group in distinct if group not in by_group]
    if strange:
        row = int(np.flatnonzero(groups == strange[0])[0])
        raise FormatError(
            f"row {row + 1} of {particles.place} is of optics group {groups[row]:g}",
            expected=f"one of the groups in data_optics: {', '.join(f'{g:g}' for g in list(by_group)[:20])}",
            remedy="correct the row, or add the group",
        )
    return np.asarray([by_group[group] for group in distinct], dtype=np.float64)[inverse]


def _one_size(sizes: Floats, name: str, particles: Table) -> float | None:
    distinct = np.unique(sizes[np.isfinite(sizes) & (sizes > 0)])
    if len(distinct) > 1:
        sizes_found = ", ".join(f"{size:g}" for size in distinct[:10])
        raise FormatError(
            f"{particles.place} gives tomogram {name} the voxel sizes {sizes_found}",
            expected="one voxel size for each tomogram",
            remedy="give the tomogram one optics group",
        )
    return float(distinct[0]) if len(distinct) else None


def _by_code(codes: npt.NDArray[np.intp], count: int) -> list[npt.NDArray[np.intp]]:
    """Return the rows of each code, in their order."""
    rows = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[rows], np.arange(count + 1))
    return [rows[ends[i] : ends[i + 1]] for i in range(count)]
