"""STAR tables, read line by line within bounds of time and memory, and written; names in them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.series_names import without_suffixes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
Column = tuple[str, Floats] | str

LARGEST_FILE = 1 << 31
MOST_ROWS = 5_000_000  # as many picks as the engine makes of one tomogram before it calls them a flood
MOST_NAMES = 200_000
FARTHEST = 1e9  # in any unit; what is farther is no place in a tomogram
_MOST_COLUMNS = 1000
_MOST_BLOCKS = 10_000
_LONGEST_LINE = 1 << 16
_LONGEST_NAME = 1000
_LINES, _BYTES = 1 << 14, 1 << 22  # at most that many are split at a time
_ROWS = 1 << 13  # that many are rendered at a time

_SPECIAL = re.compile(rb"[\"'#]")
_TOKEN = re.compile(rb"""\s*(?:"(.*?)"(?=\s|$)|'(.*?)'(?=\s|$)|([^\s"'#]\S*)|\#.*|(\S+))""")
_NONE = {"nan", "NaN", "<NA>"}  # what a STAR reader takes for a missing value


@dataclass
class Table:
    """One block of a STAR file, with those of its columns that were asked for.

    `place` is what an error calls it. `numbers` has a row for each line, NaN where there is none, and
    `faults` the row and the text of the first that is not finite. `names` are codes and what they mean.
    """

    place: str
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    numbers: dict[str, Floats] = field(default_factory=dict)
    names: dict[str, tuple[Codes, list[str]]] = field(default_factory=dict)
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)


def read_tables(path: Path, numbers: Collection[str], names: Collection[str]) -> dict[str, Table]:
    """Return the tables of a STAR file by the name of their block ("" for a bare data_).

    Columns called as one of `numbers` and `names` are kept, of the others it is known that they are there.
    Raises FormatError with the line where it cannot be read, and where it is larger than any file of picks.
    """
    _refuse_hostile(path)
    tables: dict[str, Table] = {}
    with path.open("rb") as handle:
        lines = _Lines(path, handle)
        for line in lines:
            if line.startswith(b"data_"):
                name = line.split()[0][5:].decode(errors="replace")
                if name in tables or len(tables) >= _MOST_BLOCKS:
                    raise lines.wrong(f"data_{name} once more", "blocks of different names, each once")
                tables[name] = _block(lines, Table(f"data_{name} of {path}"), numbers, names)
            elif not _empty(line) and not tables:
                raise lines.wrong(f"{_shown(line)} before any block", "a STAR file: data_ and tables")
    return tables


def comments(path: Path) -> Iterator[str]:
    """Yield the comments that a STAR file has before its first block."""
    with path.open("rb") as handle:
        for line in islice(iter(lambda: handle.readline(_LONGEST_LINE), b""), MOST_NAMES):
            if line.startswith(b"data_"):
                return
            if line.startswith(b"#"):
                yield line[1:].decode(errors="replace").strip()


class _Lines:
    """The lines of a file, counted, of which the last one read can be given back."""

    def __init__(self, path: Path, handle: Iterable[bytes]) -> None:
        self._path, self._rest = path, iter(handle)
        self._again: bytes | None = None
        self.number = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.number += 1
        line, self._again = self._again, None
        if line is not None:
            return line
        line = next(self._rest)
        return line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line

    def back(self, line: bytes) -> None:
        self._again = line
        self.number -= 1

    def wrong(self, found: str, expected: str, line: int | None = None) -> FormatError:
        return FormatError(
            f"line {line or self.number} of {self._path} cannot be read as STAR: {found}",
            expected=expected,
            remedy="look at that line; a truncated download or a hand edit is usual",
        )


def _refuse_hostile(path: Path) -> None:
    """Refuse what is too large to be picks before a line of it is kept."""
    size = path.stat().st_size
    lines, read = 0, 0
    with path.open("rb") as handle:
        while size <= LARGEST_FILE and (piece := handle.read(_LONGEST_LINE)):
            found, read = piece.count(b"\n"), read + len(piece)
            if not found and len(piece) == _LONGEST_LINE:
                raise FormatError(
                    f"line {lines + 1} of {path} has more than {_LONGEST_LINE} characters",
                    expected="a STAR file",
                    remedy="check what file it is",
                )
            lines += found
    if size > LARGEST_FILE or lines > MOST_ROWS:
        raise FormatError(
            f"{path} with {size / 1e9:.1f} GB" + (f" in {lines} lines" if lines else ""),
            expected=f"a file of picks: at most {LARGEST_FILE / 1e9:.1f} GB and {MOST_ROWS} lines",
            remedy="split it by tomogram, or keep the picks above a threshold",
        )


def _block(lines: _Lines, table: Table, numbers: Collection[str], names: Collection[str]) -> Table:
    """Return the block whose data_ line was the last one read."""
    pairs: list[list[bytes]] = []
    for line in lines:
        if line.startswith(b"data_"):
            lines.back(line)
            break
        if line.startswith(b"loop_"):
            return _loop(lines, table, numbers, names)
        if not _empty(line):
            fields = _fields(lines, line, lines.number)
            if not fields[0].startswith(b"_") or len(fields) != 2:
                raise lines.wrong(f"{_shown(line)} outside a loop", "a label and its value, or loop_")
            pairs.append(fields)
    _label(lines, table, [label for label, _ in pairs])
    wanted = _Wanted(table, numbers, names)
    if pairs:
        wanted.add(lines, [[value for _, value in pairs]])
    return wanted.table()


def _loop(lines: _Lines, table: Table, numbers: Collection[str], names: Collection[str]) -> Table:
    labels: list[bytes] = []
    for line in lines:
        if not line.lstrip().startswith(b"_"):
            if _empty(line) and not labels:
                continue
            lines.back(line)
            break
        labels.append(line.split()[0])
    _label(lines, table, labels)
    wanted = _Wanted(table, numbers, names)
    while chunk := _chunk(lines):
        first = lines.number - len(chunk) + 1
        special = any(map(_SPECIAL.search, chunk))
        rows = (
            [_fields(lines, line, first + i) for i, line in enumerate(chunk)]
            if special
            else [line.split() for line in chunk]
        )
        counts = np.fromiter(map(len, rows), np.intp, len(rows))
        wrong = np.flatnonzero((counts != len(labels)) & (counts != 0))
        if len(wrong):
            raise lines.wrong(
                f"{counts[wrong[0]]} values in {table.place}",
                f"one for each of the {len(labels)} columns",
                first + int(wrong[0]),
            )
        wanted.add(lines, [row for row in rows if row])
    return wanted.table()


def _chunk(lines: _Lines) -> list[bytes]:
    """Return the next lines of a loop; none at its end."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        if line.startswith(b"data_") and len(line.split()) == 1:
            lines.back(line)
            break
        chunk.append(line)
        size += len(line)
        if len(chunk) == _LINES or size > _BYTES:
            break
    else:
        lines.number -= 1  # the end was counted
    return chunk


def _label(lines: _Lines, table: Table, labels: Sequence[bytes]) -> None:
    if len(labels) > _MOST_COLUMNS:
        raise lines.wrong(f"{len(labels)} columns", f"at most {_MOST_COLUMNS}")
    table.columns = [label[1:].decode(errors="replace") for label in labels]
    repeated = [column for column in table.columns if table.columns.count(column) > 1]
    if repeated:
        raise FormatError(
            f"{table.place} has the column {repeated[0]} twice",
            expected="each column once",
            remedy="remove one of them",
        )


def _fields(lines: _Lines, line: bytes, number: int) -> list[bytes]:
    """Return the values of a line that may have quotes and a comment."""
    fields = []
    for token in _TOKEN.finditer(line.rstrip()):
        double, single, bare, unclosed = token.groups()
        if unclosed is not None:
            raise lines.wrong(f"the quote of {_shown(unclosed)} is not closed", "quotes in pairs", number)
        value = next((part for part in (double, single, bare) if part is not None), None)
        if value is not None:
            fields.append(value)
    return fields


def _empty(line: bytes) -> bool:
    return not (stripped := line.strip()) or stripped.startswith(b"#")


def _shown(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace").rstrip())


class _Wanted:
    """The columns of a table that are kept, as its rows come."""

    def __init__(self, table: Table, numbers: Collection[str], names: Collection[str]) -> None:
        self._table = table
        self._numbers: dict[str, tuple[int, list[Floats]]] = {}
        self._names: dict[str, tuple[int, list[Codes], dict[bytes, int]]] = {}
        for i, column in enumerate(table.columns):
            if column in numbers:
                self._numbers[column] = i, []
            if column in names:
                self._names[column] = i, [], {}

    def add(self, lines: _Lines, rows: list[list[bytes]]) -> None:
        for column, (i, kept) in self._numbers.items():
            kept.append(self._floats(column, [row[i] for row in rows]))
        for column, (i, codes, known) in self._names.items():
            found = (known.setdefault(row[i], len(known)) for row in rows)
            codes.append(np.fromiter(found, np.intp, len(rows)))
            if len(known) > MOST_NAMES:
                raise lines.wrong(
                    f"more than {MOST_NAMES} different values of {column}", "names of tomograms"
                )
        self._table.rows += len(rows)

    def _floats(self, column: str, texts: list[bytes]) -> Floats:
        try:
            values = np.fromiter(map(float, texts), np.float64, len(texts))
            if np.isfinite(values).all() and b"_" not in b"".join(texts):
                return values
        except ValueError:
            pass
        values = np.fromiter(map(_float, texts), np.float64, len(texts))
        wrong = np.flatnonzero(np.isnan(values))
        if len(wrong):
            fault = self._table.rows + int(wrong[0]), texts[wrong[0]][:60].decode(errors="replace")
            self._table.faults.setdefault(column, fault)
        return values

    def table(self) -> Table:
        table = self._table
        for column, (_, kept) in self._numbers.items():
            table.numbers[column] = np.concatenate([np.zeros(0), *kept])
        for column, (_, codes, known) in self._names.items():
            meant = [_text(table, column, name) for name in known]
            table.names[column] = np.concatenate([np.zeros(0, np.intp), *codes]), meant
        return table


def _float(text: bytes) -> float:
    """Return a finite number, or NaN."""
    try:
        value = float(text) if b"_" not in text else math.nan
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _text(table: Table, column: str, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{column} {name[:60]!r} in {table.place}",
            expected="text in UTF-8",
            remedy="save the file in UTF-8",
        ) from error


def finite_column(table: Table, column: str) -> Floats:
    """Return a column as numbers; one that is none, or beyond all bounds, is an error that names its row."""
    values = table.numbers[column]
    far = np.flatnonzero(np.abs(values) > FARTHEST)
    if column in table.faults or len(far):
        row, text = table.faults.get(column) or (int(far[0]), f"{values[far[0]]:g}")
        raise FormatError(
            f"row {row + 1} of {table.place} has {column} {text!r}",
            expected="a finite number",
            remedy="correct or remove that row",
        )
    return values


def name_column(table: Table, choices: Sequence[str]) -> tuple[Codes, list[str]]:
    """Return the first column of `choices` that the table has: a code for each row, and the names.

    Programs write paths where they mean tomograms: of those the last part counts, without the suffixes
    of tomograms and tilt series. Two that become one name by that are an error.
    """
    column = next((choice for choice in choices if choice in table.names), None)
    if column is None:
        raise FormatError(
            f"{table.place} has no column of tomogram names",
            expected=" or ".join(choices),
            remedy="add the column",
        )
    codes, names = table.names[column]
    for missing in ("", *_NONE):
        if missing in names:
            row = int(np.flatnonzero(codes == names.index(missing))[0])
            raise FormatError(
                f"row {row + 1} of {table.place} has no {column}",
                expected="the name of a tomogram",
                remedy="correct or remove that row",
            )
    plain: dict[str, str] = {}
    for name in names:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise FormatError(
                f"{table.place} has {column} {name[:60]!r}",
                expected=f"names of at most {_LONGEST_NAME} printable characters",
                remedy="check that it is a file of particles",
            )
        other = plain.setdefault(_without_path(name), name)
        if other != name:
            raise FormatError(
                f"{table.place} has the tomograms {other} and {name}",
                expected="tomograms of different names, folders and suffixes apart",
                remedy="rename one of them, or give each a file of its own",
            )
    return codes, list(plain)


def check_name(name: str) -> str:
    """Return a tomogram name that a STAR file can hold."""
    if not name or not name.isprintable() or set(name) & set("\"'#") or name.strip() in {"", *_NONE}:
        raise FormatError(
            f"the tomogram name {name!r}",
            expected="a name of printable characters without quotes and #, other than nan",
            remedy="name the tomogram: dataclasses.replace(picks, tomogram=...), or pass a mapping of names",
        )
    return name


def _without_path(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if len(parts) == 1:
        return name.removesuffix(".tomostar") or name
    return without_suffixes(parts[-1]) or name


def render_tables(
    tables: Mapping[str, Sequence[Mapping[str, Column]]], comments: Sequence[str], *, loop: bool = True
) -> bytes:
    """Return a STAR file after lines of comment: for each table columns of rows, in several parts.

    A column is numbers with their format, or a word that all rows of its part share; a part without
    numbers is one row. All parts of a table have the same columns. Without `loop` a row is pairs.
    """
    parts = [b"\n", *(f"# {comment}\n".encode() for comment in comments)]
    for name, rows in tables.items():
        parts.append(f"\ndata_{name}\n\n".encode())
        if not loop:
            parts += [f"_{label} {_quoted(str(word))}\n".encode() for label, word in rows[0].items()]
            continue
        header = "".join(f"_{label} #{i}\n" for i, label in enumerate(rows[0], start=1))
        parts.append(f"loop_\n{header}".encode())
        for some in rows:
            parts += _lines_of(list(some.values()))
    return b"".join([*parts, b"\n"])


def _lines_of(columns: Sequence[Column]) -> Iterator[bytes]:
    forms = [_quoted(one).replace("%", "%%") if isinstance(one, str) else one[0] for one in columns]
    template = "\t".join(forms) + "\n"
    numbers = [one[1] for one in columns if not isinstance(one, str)]
    count = len(numbers[0]) if numbers else 1
    for start in range(0, count, _ROWS):
        block = (
            np.stack([column[start : start + _ROWS] for column in numbers], axis=1)
            if numbers
            else np.zeros((1, 0))
        )
        yield ((template * len(block)) % tuple(block.ravel().tolist())).encode()


def _quoted(word: str) -> str:
    return f'"{word}"' if not word or any(letter.isspace() for letter in word) else word
