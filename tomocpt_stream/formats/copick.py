"""copick's files of picks (.json), and whole projects of them.

In a project (a folder) each kind of particle of each run has a file of its own,
`ExperimentRuns/<run>/Picks/<user>_<session>_<object>.json`; the run is the tomogram. Positions are in Å
without a half voxel: location plus the translation of the 4 x 4 matrix, from particle to tomogram.
`trust_orientation` says whether that matrix turns anything; where a file leaves it out, it does unless
all are identities. Scores and voxel spacing are in the file; instance_id is 0 where we write it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.asked import lacking
from tomocpt_stream.formats.folders import file_name, files_in, one_kind
from tomocpt_stream.formats.gathered import are_rotations
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.formats.delimited import Floats

USER, SESSION, UNNAMED = "tomocpt-stream", "1", "particle"
LARGEST_FILE = 1 << 29  # as parsed it takes some ten times that
_PATTERN = "ExperimentRuns/*/Picks/*.json"
_FARTHEST = 1e12


@dataclass(frozen=True)
class PickFile:
    """What one file says: positions (n, 3) x, y, z in Å, and the numbers of instances (n,)."""

    run: str | None
    kind: str
    voxel_spacing: float | None
    xyz: Floats
    scores: Floats
    rotations: Floats | None
    instances: npt.NDArray[np.int64]


def read(path: Path, format: str | None, asked: Asked) -> list[Picks]:  # noqa: A002
    """Return the picks of a file, or of each run and kind of a project."""
    del format
    found: dict[tuple[str, str], Path] = {}
    tables = []
    for one in files_in(path, ".json", _PATTERN):
        table = _table(one, asked)
        before = found.setdefault((table.tomogram, table.particle), one)
        if before != one:
            raise FormatError(
                f"{one.name} and {before.name} both have {table.particle} of run {table.tomogram}",
                expected="one user and session for each kind of particle",
                remedy="read one of the files by its own path",
            )
        tables.append(table)
    return tables


def render(picks: Sequence[Picks], format: str, asked: Asked, name: str) -> dict[str, bytes]:  # noqa: A002
    """Return one file, or those of a project where `name` does not end in .json."""
    del format
    if name.lower().endswith(".json"):
        return {name: _render_one(one_kind(picks, name), asked)}
    files: dict[str, bytes] = {}
    for table in picks:
        run, kind = file_name(table.tomogram), _object_name(table)
        key = f"{name}/ExperimentRuns/{run}/Picks/{USER}_{SESSION}_{file_name(kind, 'particle')}.json"
        if key in files:
            one_kind([one for one in picks if one.tomogram == run], key)
        files[key] = _render_one(table, asked)
    return files


def parse_picks(data: bytes, place: str) -> PickFile:
    """Return what a file's bytes say; `place` is what an error calls it.

    Raises FormatError, which names the point, where it is no such file or a point is not whole.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{place} is no JSON ({error})", expected="a copick file of picks", remedy="fetch it again"
        ) from error
    points = said.get("points") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or not isinstance(points, list):
        raise FormatError(
            f"{place} is {'an object without points' if isinstance(said, Mapping) else 'no object'}",
            expected="a copick file: pickable_object_name, voxel_spacing, points and more",
            remedy="check that it is a file of picks, not the configuration of a project",
        )
    unit = said.get("unit", "angstrom")
    if unit != "angstrom":
        raise FormatError(f"{place} has the unit {unit!r}", expected="angstrom", remedy="convert the file")
    matrices = _column(
        points, lambda point: point.get("transformation_") or np.eye(4).tolist(), (4, 4), place
    )
    location = [lambda point, axis=axis: point["location"][axis] for axis in "xyz"]
    xyz = np.stack([_column(points, one, (), place) for one in location], axis=1)
    turns = np.asarray(matrices[:, :3, :3])
    trusted = said.get("trust_orientation")
    if trusted is None:
        trusted = bool((turns != np.eye(3)).any())
    if trusted:
        wrong = np.flatnonzero(~are_rotations(turns))
        if len(wrong):
            raise _wrong(int(wrong[0]), place, "a matrix that does more than turn", "an orthogonal one")
    spacing = said.get("voxel_spacing")
    if spacing is not None and not (_is_number(spacing) and 0 < spacing < _FARTHEST):
        raise FormatError(
            f"{place} has the voxel_spacing {str(spacing)[:60]}", expected="Å above 0", remedy="correct it"
        )
    return PickFile(
        run=_text(said, "run_name"),
        kind=_text(said, "pickable_object_name") or "",
        voxel_spacing=None if spacing is None else float(spacing),
        xyz=xyz + matrices[:, :3, 3],
        scores=_column(
            points, lambda point: 1.0 if point.get("score") is None else point["score"], (), place
        ),
        rotations=turns if trusted and len(turns) else None,
        instances=_column(points, lambda point: point.get("instance_id") or 0, (), place).astype(np.int64),
    )


def _table(path: Path, asked: Asked) -> Picks:
    if path.stat().st_size > LARGEST_FILE:
        raise FormatError(
            f"{path} has {path.stat().st_size / 1e9:.1f} GB",
            expected=f"at most {LARGEST_FILE / 1e9:.1f} GB",
            remedy="split it",
        )
    found = parse_picks(path.read_bytes(), str(path))
    name = found.run or _run_of(path)
    size = asked.of(name, found.voxel_spacing)
    if size.voxel_size is None:
        raise lacking(name, str(path), "voxel size", "voxel_size= (--voxel-size) in Å")
    return Picks(
        zyx=found.xyz[:, ::-1] / size.voxel_size,
        score=found.scores.astype(np.float32),
        rotations=found.rotations,
        voxel_size=size.voxel_size,
        tomogram=name,
        shape=size.shape,
        particle=found.kind,
    )


def _render_one(table: Picks, asked: Asked) -> bytes:
    known = asked.known(table.tomogram)
    voxel_size = table.voxel_size or (known[1].voxel_size if known else None)
    if voxel_size is None:
        raise lacking(table.tomogram, "the table of picks", "voxel size", "picks with one (--voxel-size)")
    matrices = np.tile(np.eye(4), (len(table), 1, 1))
    if table.rotations is not None:
        matrices[:, :3, :3] = table.rotations
    xyz = np.round(table.zyx[:, ::-1] * voxel_size, 6)
    points = [
        {
            "location": dict(zip("xyz", place, strict=True)),
            "transformation_": matrix,
            "instance_id": 0,
            "score": score,
        }
        for place, matrix, score in zip(
            xyz.tolist(), matrices.tolist(), map(float, table.score.astype("U")), strict=True
        )
    ]
    said = {
        "pickable_object_name": _object_name(table),
        "user_id": USER,
        "session_id": SESSION,
        "run_name": table.tomogram,
        "voxel_spacing": voxel_size,
        "unit": "angstrom",
        "trust_orientation": table.rotations is not None,
        "points": points,
    }
    return json.dumps(said, indent=1 if len(points) < 1000 else None).encode()


def _object_name(table: Picks) -> str:
    name = table.particle or UNNAMED
    if "_" in name:
        raise FormatError(
            f"the particle name {name!r}",
            expected="a name without _ , which separates the parts of copick's file names",
            remedy=f"rename it: dataclasses.replace(picks, particle={name.replace('_', '-')!r})",
        )
    return name


def _run_of(path: Path) -> str:
    """Return the run that a file lies under, or else the file's own name."""
    parts = path.parts
    inside = len(parts) > 3 and parts[-4] == "ExperimentRuns" and parts[-2] == "Picks"
    return parts[-3] if inside else path.name.removesuffix(".json")


def _column(points: list[Any], value_of: Any, shape: tuple[int, ...], place: str) -> Floats:
    """Return one value of each point as an array; one that is missing or no number is an error."""
    values = []
    try:
        for point in points:
            values.append(value_of(point))  # noqa: PERF401  (how far it came is used below)
    except (KeyError, TypeError, AttributeError) as error:
        found = f"no whole point ({type(error).__name__}: {error})"
        raise _wrong(len(values), place, found, "location with x, y, z, and perhaps a matrix") from error
    for row, value in enumerate(values):
        if not _has_shape(value, shape):
            expected = " x ".join(map(str, shape)) + " numbers" if shape else f"a number below {_FARTHEST:g}"
            raise _wrong(row, place, repr(value)[:60], expected)
    return np.array(values, dtype=np.float64).reshape(-1, *shape)


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    if not shape:
        return _is_number(value) and -_FARTHEST < value < _FARTHEST
    return (
        isinstance(value, list)
        and len(value) == shape[0]
        and all(_has_shape(one, shape[1:]) for one in value)
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _text(said: Mapping[str, Any], key: str) -> str | None:
    value = said.get(key)
    return str(value)[:1000] if value is not None and str(value).isprintable() else None


def _wrong(row: int, place: str, found: str, expected: str) -> FormatError:
    return FormatError(
        f"point {row + 1} of {place} has {found}", expected=expected, remedy="correct or remove that point"
    )
