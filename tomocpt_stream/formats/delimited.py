"""Rows of text between commas, tabs, pipes or blanks; every fault names its line.

Files are read a batch of rows at a time, so that what is kept is numbers, not text.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

LARGEST_FILE = 1 << 30
LONGEST_LINE = 1 << 16
MOST_NAMES = 1_000_000
FARTHEST = 1e9
_BATCH = 20_000
_DELIMITERS = {",": "commas", "\t": "tabs", "|": "pipes", ";": "semicolons"}


@dataclass(frozen=True)
class Head:
    """The first row of a file that has anything, and what stands between its cells (None: blanks)."""

    cells: tuple[str, ...]
    delimiter: str | None

    @property
    def is_data(self) -> bool:
        """Whether every cell is a number, as in a file without a header."""
        return all(_is_number(cell) for cell in self.cells)


@dataclass(frozen=True)
class Names:
    """A column of names: `distinct` in the order they first come, and the index of each row's."""

    distinct: list[str]
    codes: Codes


@dataclass(frozen=True)
class Columns:
    """The columns that were asked for; `lines` says where each row stands in the file."""

    numbers: Floats
    names: tuple[Names, ...]
    lines: Codes


def read_head(path: Path, *, blanks: bool = False) -> Head:
    """Return the first row of a file; with `blanks`, cells are between blanks or tabs.

    Raises FormatError where that row has more than one kind of delimiter, or a name twice.
    """
    with _opened(path) as stream:
        line = next((text for text in _lines(stream, path) if text.strip()), "").strip("\r\n")
    if not line:
        return Head((), None if blanks else ",")
    if blanks:
        return Head(tuple(line.split()), None)
    found = [delimiter for delimiter in _DELIMITERS if delimiter in line]
    if len(found) > 1:
        raise FormatError(
            f"the first line of {path} has {' and '.join(_DELIMITERS[one] for one in found)}: {line[:80]!r}",
            expected="one kind of delimiter",
            remedy="write it again with commas or tabs alone",
        )
    delimiter = found[0] if found else ","
    cells = next(csv.reader(io.StringIO(line), delimiter=delimiter), [])
    head = Head(tuple(cell.strip() for cell in cells), delimiter)
    repeated = next((cell for cell, times in Counter(head.cells).items() if cell and times > 1), None)
    if repeated is not None and not head.is_data:
        raise FormatError(
            f"{path} has the column {repeated[:60]} twice",
            expected="each column once",
            remedy="remove one of them",
        )
    return head


def read_columns(
    path: Path,
    head: Head,
    *,
    numbers: Sequence[int],
    names: Sequence[int] = (),
    blank: Sequence[int] = (),
) -> Columns:
    """Return columns of numbers, (n, columns), and of names.

    The row of `head` is left out unless it is data. In the columns of `blank` an empty cell, or one
    that says nan, is NaN; elsewhere it is an error, as is a number that is not finite or 1e9 and more.

    Raises
    ------
    FormatError
        A row has more or fewer cells than the first, or a cell is no number. The message names the line.
    """
    taken: list[Floats] = [np.zeros((0, len(numbers)))]
    where: list[Codes] = [np.zeros(0, np.int64)]
    known: list[dict[str, int]] = [{} for _ in names]
    codes: list[list[Codes]] = [[np.zeros(0, np.int64)] for _ in names]
    may_be_blank = np.array([column in blank for column in numbers], dtype=bool)
    with _opened(path) as stream:
        rows = _rows(stream, path, head)
        while batch := list(islice(rows, _BATCH)):
            lines = [line for line, _ in batch]
            where.append(np.array(lines, dtype=np.int64))
            taken.append(_numbers(batch, numbers, may_be_blank, head, path))
            for column, seen, found in zip(names, known, codes, strict=True):
                texts = [cells[column].strip() for _, cells in batch]
                found.append(np.array([seen.setdefault(text, len(seen)) for text in texts], dtype=np.int64))
                if len(seen) > MOST_NAMES:
                    raise FormatError(
                        f"{path} has more than {MOST_NAMES} names in column {_label(head, column)}",
                        expected="names of tomograms and of kinds of particles",
                        remedy="check that the columns are what their header says",
                    )
    return Columns(
        np.concatenate(taken),
        tuple(Names(list(seen), np.concatenate(found)) for seen, found in zip(known, codes, strict=True)),
        np.concatenate(where),
    )


def render_rows(columns: Sequence[Sequence[str]], delimiter: str) -> str:
    """Return columns of text as lines; no cell may hold the delimiter unless `quoted`."""
    return "".join(f"{line}\n" for line in map(delimiter.join, zip(*columns, strict=True)))


def quoted(text: str, delimiter: str) -> str:
    """Return a text as one cell."""
    if not text.isprintable():
        raise FormatError(
            f"the name {text!r}", expected="a name of printable characters", remedy="rename the picks"
        )
    special = delimiter in text or '"' in text or text != text.strip()
    return '"' + text.replace('"', '""') + '"' if special else text


def shortest(values: npt.NDArray[np.floating]) -> list[str]:
    """Return numbers as the shortest texts that are read back as the same."""
    if values.dtype == np.float32:
        return [str(value) for value in values.astype("U")]
    return [repr(value) for value in values.tolist()]


def wrong_line(path: Path, line: int, found: str, expected: str) -> FormatError:
    """Return the error for one line of a file."""
    return FormatError(
        f"line {line} of {path} has {found}", expected=expected, remedy="correct or remove that line"
    )


def _opened(path: Path) -> IO[str]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise FormatError(
                f"{path} has {path.stat().st_size / 1e9:.1f} GB",
                expected=f"a table of points, of at most {LARGEST_FILE / 1e9:.1f} GB",
                remedy="split it by lines",
            )
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise FormatError(
            f"{path} cannot be read ({error})", expected="a table in text", remedy="check the path"
        ) from error


def _lines(stream: IO[str], path: Path) -> Iterator[str]:
    number = 0
    try:
        while line := stream.readline(LONGEST_LINE):
            number += 1
            if len(line) >= LONGEST_LINE:
                raise wrong_line(path, number, f"{LONGEST_LINE} characters and more", "one row of a table")
            if "\0" in line:
                raise wrong_line(path, number, "bytes of zero", "text")
            yield line
    except UnicodeDecodeError as error:
        raise wrong_line(path, number + 1, f"bytes that are no text ({error})", "UTF-8 text") from error


def _rows(stream: IO[str], path: Path, head: Head) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of every row of data."""
    lines = _lines(stream, path)
    found: Iterator[tuple[int, list[str]]]
    if head.delimiter is None:
        found = ((number, line.split()) for number, line in enumerate(lines, 1))
    else:
        found = _quoted_rows(lines, head.delimiter, path)
    full = ((number, cells) for number, cells in found if any(cell.strip() for cell in cells))
    first = next(full, None)
    if first is None:
        return
    for number, cells in chain([first] if head.is_data else [], full):
        if len(cells) != len(head.cells):
            raise wrong_line(path, number, f"{len(cells)} cells", f"{len(head.cells)}, as in the first line")
        yield number, cells


def _quoted_rows(lines: Iterator[str], delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise wrong_line(path, reader.line_num, f"no row ({error})", "cells, quoted or not") from error


def _numbers(
    batch: list[tuple[int, list[str]]],
    columns: Sequence[int],
    may_be_blank: npt.NDArray[np.bool_],
    head: Head,
    path: Path,
) -> Floats:
    table = np.empty((len(batch), len(columns)))
    for place, column in enumerate(columns):
        texts = [cells[column] for _, cells in batch]
        if may_be_blank[place]:
            texts = [text if text.strip() else "nan" for text in texts]
        try:
            table[:, place] = np.array(texts, dtype=np.float64)
        except (ValueError, OverflowError):
            table[:, place] = [float(text) if _is_number(text) else np.inf for text in texts]
    wrong = ~(np.abs(table) < FARTHEST) & ~(may_be_blank & np.isnan(table))
    if wrong.any():
        row, place = (int(index) for index in np.argwhere(wrong)[0])
        line, cells = batch[row]
        column = columns[place]
        raise wrong_line(
            path,
            line,
            f"{_label(head, column)} {cells[column][:60]!r}",
            f"a finite number below {FARTHEST:g}",
        )
    return table


def _label(head: Head, column: int) -> str:
    return f"column {column + 1}" if head.is_data else head.cells[column]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
