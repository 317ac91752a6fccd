"""Picks as STAR files: rows in a dialect's frame, optics groups, and RELION's optimisation set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.asked import Asked, lacking
from tomocpt_stream.formats.extents import Extent, extent
from tomocpt_stream.formats.places import Place, Places
from tomocpt_stream.formats.relion import (
    DIALECTS,
    GROUP,
    SERIES_SIZE,
    VOXEL_SIZE,
    Dialect,
    angles_of,
)
from tomocpt_stream.formats.tables import FARTHEST, Column, check_name, render_tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tomocpt_stream.picks import Picks

_DEFAULTS = (("rlnSphericalAberration", 2.7), ("rlnVoltage", 300.0))
_SAYS_ITSELF = ("relion31", "relion5")  # dialects that columns tell


@dataclass(frozen=True)
class _Written:
    """The picks of a tomogram, what the file calls it, and where they lie."""

    picks: Picks
    name: str
    size: Extent
    place: Place


def render(picks: Sequence[Picks], dialect: str, asked: Asked, name: str) -> dict[str, bytes]:
    """Return a STAR file called `name` with the picks of some tomograms, and its optimisation set if asked.

    Raises FormatError where a tomogram lacks its name, or a size that the dialect depends on.
    """
    spoken = DIALECTS[dialect]
    written = _written(picks, spoken, asked)
    _refuse_two_sizes(written, one=dialect == "warp")
    full = [one for one in written if len(one.picks)]
    _refuse_kinds([one.picks.particle for one in full], name)
    oriented = [one.picks.tomogram for one in full if one.picks.rotations is not None]
    if oriented and len(oriented) < len(full):
        raise FormatError(
            f"picks with rotations (in {oriented[0]}) beside picks without",
            expected="rotations for all picks of a file, or for none",
            remedy="write them to two files, or drop the rotations",
        )
    optics, groups = _optics([one.size for one in written], spoken)
    numbered = [(one, group) for one, group in zip(written, groups, strict=True) if len(one.picks)]
    rows = [_rows(one, spoken, group) for one, group in numbered] or [_no_rows(spoken, optics)]
    blocks = {"optics": optics, "particles": rows} if optics else {"particles": rows}
    files = {name: render_tables(blocks, _comments(written, dialect))}
    if asked.companion is not None:
        if not spoken.series or spoken.suffix:
            raise FormatError(
                f"an optimisation set for {dialect}",
                expected="a dialect of RELION 4 or 5",
                remedy="write relion5, or no optimisation set",
            )
        files[_beside(name)] = _optimisation_set(*asked.companion)
    return files


def _written(picks: Sequence[Picks], dialect: Dialect, asked: Asked) -> list[_Written]:
    places = Places(dialect, replace(asked, voxel_size=None, shape=None), "the table of picks")
    names = [check_name(table.tomogram) for table in picks]
    called = asked.names(names, series=dialect.series, needed=dialect.frame == "centred")
    found = []
    for table in picks:
        size = _size(table, asked)
        if size.voxel_size is None:
            raise lacking(table.tomogram, "the table of picks", "voxel size", "picks with one (--voxel-size)")
        if dialect.frame == "centred" and size.angstrom is None:
            raise lacking(table.tomogram, "the table of picks", "size", "picks with a shape (--shape)")
        if asked.pixel_size is not None and size.pixel_size is None:
            size = replace(size, pixel_size=asked.pixel_size)
        place = _in_its_own_voxels(places, dialect).of(table.tomogram, size, None)
        found.append(_Written(table, check_name(called[table.tomogram]), size, place))
    return found


def _size(table: Picks, asked: Asked) -> Extent:
    """Return the size of a table's tomogram; the table knows its voxels, a list the whole."""
    found = asked.known(table.tomogram)
    every = asked.tomograms.every if asked.tomograms is not None else Extent()
    known = every if found is None else found[1]
    voxel_size = table.voxel_size or known.voxel_size
    if known.angstrom is None:
        return replace(extent(table.shape or known.shape, voxel_size), pixel_size=known.pixel_size)
    return replace(known, voxel_size=voxel_size)


def _in_its_own_voxels(places: Places, dialect: Dialect) -> Places:
    """Return places whose coordinates count the tomogram's voxels where the dialect has voxels."""
    if dialect.frame not in ("tomogram", "export"):
        return places
    if dialect.frame == "export" and places.asked.mean_binned:
        return replace(places, asked=replace(places.asked, pixel_size=None))
    return replace(places, asked=replace(places.asked, pixel_size=None, mean_binned=False))


def _refuse_two_sizes(written: Sequence[_Written], *, one: bool) -> None:
    """Refuse picks of a tomogram in several voxel sizes; with `one`, those of a whole file."""
    sizes: dict[str, float | None] = {}
    for found in written:
        name = "" if one else found.name
        if sizes.setdefault(name, found.size.voxel_size) != found.size.voxel_size:
            raise FormatError(
                f"picks of tomogram {found.name} in voxels of {sizes[name]} and of {found.size.voxel_size} Å"
                if not one
                else f"picks in voxels of {sizes[name]} and of {found.size.voxel_size} Å",
                expected="one voxel size for each file, as --coords_angpix"
                if one
                else "one voxel size for each tomogram",
                remedy="write them to two files",
            )


def _refuse_kinds(particles: Sequence[str], name: str) -> None:
    """Refuse several kinds of particles, which nobody could tell apart in the file again."""
    kinds = list(dict.fromkeys(particles))
    if len(kinds) > 1:
        raise FormatError(
            f"picks of {len(kinds)} kinds of particles for {name}: {', '.join(map(repr, kinds[:10]))}",
            expected="one kind in a STAR file, which has no place for kinds",
            remedy="write each kind to a file of its own: particle= of read_picks, --particle",
        )


def _optics(sizes: Sequence[Extent], dialect: Dialect) -> tuple[list[dict[str, Column]], list[int]]:
    """Return a row for each optics group, one for each pixel size, and the group of each tomogram.

    There is none in Warp's files, nor without a tomograms.star in those of RELION 5, like in its own.
    """
    kinds: list[tuple[tuple[str, float | None], ...]]
    if dialect.frame == "tomogram":
        kinds = [(*_DEFAULTS, (VOXEL_SIZE, size.voxel_size), ("rlnImageDimensionality", 3)) for size in sizes]
    elif dialect.frame != "export" and sizes and all(size.pixel_size is not None for size in sizes):
        kinds = [(*size.optics, (SERIES_SIZE, size.pixel_size)) for size in sizes]
    else:
        return [], [0] * len(sizes)
    distinct = {kind: i for i, kind in enumerate(dict.fromkeys(kinds), start=1)}
    rows: list[dict[str, Column]] = [
        {GROUP: str(i), "rlnOpticsGroupName": f"opticsGroup{i}", **{key: repr(value) for key, value in kind}}
        for kind, i in distinct.items()
    ]
    return rows, [distinct[kind] for kind in kinds]


def _rows(written: _Written, dialect: Dialect, group: int) -> dict[str, Column]:
    """Return the columns of some picks; never the name first, which could look like a block."""
    picks = written.picks
    columns: dict[str, Column] = {}
    xyz = written.place.coordinates(picks.zyx[:, ::-1])
    wrong = np.flatnonzero(~(np.abs(np.column_stack([xyz, picks.score])) <= FARTHEST).all(axis=1))
    if len(wrong):
        row = int(wrong[0])
        raise FormatError(
            f"pick {row} of {picks.tomogram} at {xyz[row].tolist()} with score {picks.score[row]}",
            expected=f"finite numbers, none beyond {FARTHEST:g}",
            remedy="remove that pick",
        )
    columns |= {label: ("%.6f", column) for label, column in zip(dialect.coordinates, xyz.T, strict=True)}
    if picks.rotations is not None:
        angles = angles_of(picks.rotations).T
        columns |= {label: ("%.6f", column) for label, column in zip(dialect.angles, angles, strict=True)}
    columns[dialect.names[0]] = written.name.removesuffix(dialect.suffix) + dialect.suffix
    columns[dialect.score] = ("%.6g", picks.score.astype(np.float64))
    return columns | ({GROUP: str(group)} if group else {})


def _no_rows(dialect: Dialect, optics: Sequence[object]) -> dict[str, Column]:
    none: Column = ("%g", np.zeros(0))
    labels = [*dialect.coordinates, dialect.names[0], dialect.score, *([GROUP] if optics else [])]
    return dict.fromkeys(labels, none)


def _comments(written: Sequence[_Written], dialect: str) -> list[str]:
    lines = [f"version {DIALECTS[dialect].version}"]
    if dialect not in _SAYS_ITSELF:
        size = f", voxel size {written[0].size.voxel_size!r}" if dialect == "warp" and written else ""
        lines.append(f"picks in the frame of {dialect}{size}")
    lines += [
        f"tomogram {one.name} has no picks, voxel size {one.size.voxel_size!r}"
        for one in written
        if not len(one.picks)
    ]
    return lines


def _beside(name: str) -> str:
    """Return what RELION calls the optimisation set of a file of particles."""
    stem = name.removesuffix(".star")
    start = next((stem.removesuffix(end) for end in ("particles", "data") if stem.endswith(end)), f"{stem}_")
    return f"{start}optimisation_set.star"


def _optimisation_set(particles: str, tomograms: str) -> bytes:
    row: Mapping[str, Column] = {"rlnTomoParticlesFile": particles, "rlnTomoTomogramsFile": tomograms}
    return render_tables({"": [row]}, ["version 50001"], loop=False)
