"""Point annotations of the CZ CryoET Data Portal: one JSON object a line.

`location` is x, y, z in voxels of the tomogram, 0 at the centre of the first one. `xyz_rotation_matrix`
turns a vector (x, y, z) of the particle into one of the tomogram. There is no score: these files say
where something is, not how sure anybody was.
"""

from __future__ import annotations

import codecs
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.gathered import TOLERANCE, are_rotations
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tomocpt_stream.frame import Points, Shape

Kind = Literal["point", "orientedPoint", "instancePoint"]

KINDS: tuple[Kind, ...] = get_args(Kind)

# An oriented point takes 300 bytes; whoever wrote a line of 64 kB did not mean one point.
LONGEST_LINE = 1 << 16
# More than ten million points; larger files are segmentations that somebody wrote point by point.
LARGEST_FILE = 1 << 30
FARTHEST = 1e9
_BATCH = 1 << 20
_NUMBERS = {int, float}
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True, eq=False)
class PointRecords:
    """The points of one file, in the order of their lines.

    `zyx` is (n, 3) in voxels. `rotations` is (n, 3, 3) where the points are oriented, `instances` (n,)
    where each belongs to one of several objects; otherwise they are None. `kind` is None where the file
    has no line.
    """

    kind: Kind | None
    zyx: Points
    rotations: npt.NDArray[np.float64] | None = None
    instances: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.zyx)

    @property
    def objects(self) -> int:
        """What the portal counts as objects: instances where there are some, else points."""
        return len(self) if self.instances is None else len(np.unique(self.instances))


def read_ndjson(
    path: str | Path,
    *,
    voxel_size: float | None = None,
    shape: Shape | None = None,
    tomogram: str | None = None,
    particle: str = "",
) -> Picks:
    """Return the picks of a file of point annotations, each with score 1: the portal keeps none.

    `voxel_size` (Å) and `shape` (z, y, x) are those of the tomogram, about which the file says nothing;
    its name is `tomogram`, or else that of the file.

    Raises
    ------
    FormatError
        There is no such file, or a line of it is no point annotation.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"no file {path}", expected="a file of point annotations", remedy="check the path")
    _bounded(path.stat().st_size, str(path))
    found = parse_ndjson(path.read_bytes(), str(path))
    return Picks(
        zyx=found.zyx,
        score=np.ones(len(found), np.float32),
        rotations=found.rotations,
        voxel_size=voxel_size,
        tomogram=path.name.removesuffix(".ndjson") if tomogram is None else tomogram,
        shape=shape,
        particle=particle,
    )


def parse_ndjson(data: bytes, place: str) -> PointRecords:
    """Return the points of a file's bytes; `place` is what an error calls the file.

    Empty lines count as lines and say nothing. Keys that the portal does not know are passed over.

    Raises
    ------
    FormatError
        A line is not one whole JSON object, is of another kind than the first, or has a coordinate that
        is no number below 1e9, an instance that is no integer, or a matrix that is no rotation to 1e-3.
        The message names the line.
    """
    _bounded(len(data), place)
    kind: Kind | None = None
    zyx, rotations, instances = [np.empty((0, 3))], [np.empty((0, 3, 3))], [np.empty(0, np.int64)]
    for batch in _batches(data, place):
        kind = kind or batch.first_kind()
        zyx.append(batch.positions(kind))
        if kind == "orientedPoint":
            rotations.append(batch.rotations())
        if kind == "instancePoint":
            instances.append(batch.instances())
    return PointRecords(
        kind,
        np.concatenate(zyx),
        np.concatenate(rotations) if kind == "orientedPoint" else None,
        np.concatenate(instances) if kind == "instancePoint" else None,
    )


@dataclass(frozen=True)
class _Batch:
    """Some lines of a file as parsed, with their numbers.

    Every column is first taken from all of them at once; where that fails, the line to blame is looked for.
    """

    records: list[Any]
    numbers: list[int]
    place: str

    def first_kind(self) -> Kind:
        """Return the kind of the first line."""
        record = self.records[0]
        found = record.get("type") if isinstance(record, dict) else None
        kind = next((kind for kind in KINDS if kind == found), None)
        if kind is None:
            raise self._wrong(0, _described(record, "type"), f"an object with a type, {_listed(KINDS)}")
        return kind

    def positions(self, kind: Kind) -> Points:
        """Return (n, 3) zyx of lines that are all of one kind."""
        try:
            same = {record["type"] for record in self.records} == {kind}
            places = [record["location"] for record in self.records]
            found = _numbers([place[axis] for place in places for axis in "zyx"], (3,))
        except (KeyError, TypeError):
            same, found = False, None
        if not same or found is None or not (np.abs(found) < FARTHEST).all():
            raise self._blame(kind)
        return found

    def rotations(self) -> npt.NDArray[np.float64]:
        """Return (n, 3, 3), each of which turns and does nothing else."""
        matrices = [record.get("xyz_rotation_matrix") for record in self.records]
        found = _matrices(matrices)
        if found is not None and are_rotations(found).all():
            return found
        row = next(
            row
            for row, one in enumerate(map(_matrices, zip(matrices)))
            if one is None or not are_rotations(one)
        )
        raise self._wrong(
            row,
            _described(self.records[row], "xyz_rotation_matrix"),
            "three rows of three numbers that turn and neither stretch nor mirror "
            f"(orthonormal to {TOLERANCE}, determinant +1)",
        )

    def instances(self) -> npt.NDArray[np.int64]:
        """Return (n,) numbers of objects."""
        found = [record.get("instance_id") for record in self.records]
        wrong = next((row for row, value in enumerate(found) if not _is_instance(value)), None)
        if wrong is not None:
            raise self._wrong(wrong, _described(self.records[wrong], "instance_id"), "an integer of 64 bits")
        return np.array(found, dtype=np.int64)

    def _blame(self, kind: Kind) -> FormatError:
        for row, record in enumerate(self.records):
            if not isinstance(record, dict) or record.get("type") != kind:
                return self._wrong(
                    row,
                    _described(record, "type"),
                    f"the type {kind!r} as in the lines before: one kind a file",
                )
            place = record.get("location")
            values = [place.get(axis) for axis in "xyz"] if isinstance(place, dict) else []
            if not values or not all(map(_is_coordinate, values)):
                break
        return self._wrong(
            row, _described(record, "location"), f"x, y and z, each a number of voxels below {FARTHEST:g}"
        )

    def _wrong(self, row: int, found: str, expected: str) -> FormatError:
        return _wrong_line(self.numbers[row], self.place, found, expected)


def _batches(data: bytes, place: str) -> Iterator[_Batch]:
    """Yield the lines of a file that are not empty, about a megabyte at a time."""
    stream, before = io.BytesIO(data.removeprefix(codecs.BOM_UTF8)), 0
    while lines := stream.readlines(_BATCH):
        texts = {number: text for number, line in enumerate(lines, before + 1) if (text := line.strip())}
        before += len(lines)
        if texts:
            yield _Batch([_parsed(text, number, place) for number, text in texts.items()], list(texts), place)


def _parsed(line: bytes, number: int, place: str) -> Any:
    if len(line) > LONGEST_LINE:
        raise _wrong_line(number, place, f"{len(line)} bytes", f"one point, in at most {LONGEST_LINE} bytes")
    try:
        text = line.decode()
        record, end = _decode(text)
        if end == len(text):
            return record
        error: Exception = ValueError(f"more follows after character {end}")
    except (ValueError, RecursionError) as caught:
        error = caught
    shown = line[:60].decode(errors="backslashreplace")
    raise _wrong_line(
        number, place, f"{shown!r}{'...' if line[60:] else ''} ({error})", "one whole JSON object"
    ) from error


def _wrong_line(number: int, place: str, found: str, expected: str) -> FormatError:
    return FormatError(
        f"line {number} of {place} has {found}",
        expected=expected,
        remedy="fetch the file again, for one that breaks off has not come whole; or correct that line",
    )


def _bounded(size: int, place: str) -> None:
    if size > LARGEST_FILE:
        raise FormatError(
            f"{place} has {size / 1e9:.1f} GB",
            expected=f"a file of points, of at most {LARGEST_FILE / 1e9:.1f} GB",
            remedy="split it by lines",
        )


def _numbers(values: list[Any], shape: tuple[int, ...]) -> npt.NDArray[np.float64] | None:
    """Return numbers as an array of so many of a shape, None where one is none."""
    if not set(map(type, values)) <= _NUMBERS:
        return None
    try:
        return np.array(values, dtype=np.float64).reshape(-1, *shape)
    except OverflowError:  # an integer of hundreds of digits
        return None


def _matrices(found: Sequence[Any]) -> npt.NDArray[np.float64] | None:
    """Return matrices of three by three numbers as an array, None where one is none."""
    if not all(map(_square, found)):
        return None
    return _numbers([value for matrix in found for row in matrix for value in row], (3, 3))


def _square(matrix: Any) -> bool:
    return (
        isinstance(matrix, list)
        and len(matrix) == 3
        and all(isinstance(row, list) and len(row) == 3 for row in matrix)
    )


def _is_coordinate(value: Any) -> bool:
    return type(value) in _NUMBERS and -FARTHEST < value < FARTHEST


def _is_instance(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _described(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        return f"{_short(record)}, which is no object"
    return f"{key} {_short(record[key])}" if key in record else f"no {key}"


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:  # as deep as can be parsed
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"
