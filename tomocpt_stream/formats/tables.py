"""STAR tables through `starfile`, with every way of going wrong turned into one error."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import starfile
from starfile.writer import StarWriter

from tomocpt_stream.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_NAMES = ["rlnTomoName", "rlnMicrographName", "rlnOpticsGroupName"]
_MISSING = {"nan", "NaN", "<NA>"}  # what a STAR reader takes for a missing value


@dataclass(frozen=True)
class Table:
    """One block of a STAR file; `place` is what an error calls it."""

    frame: pd.DataFrame
    place: str


def read_tables(path: Path) -> dict[str, Table]:
    """Return the tables of a STAR file by the name of their block ("" for a bare data_)."""
    linecache.clearcache()  # starfile reads through it, and it may hold lines of an older file
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=_NAMES)
    except Exception as error:  # parsers fail in their own ways
        raise FormatError(
            f"{path} cannot be read as STAR: {type(error).__name__}: {error}",
            expected="a STAR file whose rows have one value for each column",
            remedy="look at the rows named; a truncated download or a hand edit is usual",
        ) from error
    tables = {}
    for name, block in (blocks or {}).items():
        frame = pd.DataFrame([block]) if isinstance(block, dict) else block
        if isinstance(frame, pd.DataFrame):
            tables[name] = Table(frame, f"data_{name} of {path}")
            _refuse_repeats(tables[name])
    return tables


def render_tables(tables: Mapping[str, pd.DataFrame], comments: Sequence[str]) -> str:
    """Return the text of a STAR file with one loop for each table, after lines of comment."""
    lines = [f"# {comment}" for comment in comments]
    writer = StarWriter(dict(tables))
    return "\n".join(["", *lines, "", *writer.data_block_generator()]) + "\n"


def finite_column(table: Table, column: str) -> npt.NDArray[np.float64]:
    """Return a column as numbers; a value that is none is an error that names its row."""
    values = np.asarray(pd.to_numeric(table.frame[column], errors="coerce"), dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise FormatError(
            f"row {wrong[0] + 1} of {table.place} has {column} {str(table.frame[column].iloc[wrong[0]])!r}",
            expected="a finite number",
            remedy="correct or remove that row",
        )
    return values


def name_column(table: Table, choices: Sequence[str]) -> npt.NDArray[np.str_]:
    """Return the first column of `choices` that the table has, as strings without any path.

    Programs write tomogram paths where they mean tomograms: of those the last part counts, without
    the suffixes of tomograms and tilt series.
    """
    column = next((choice for choice in choices if choice in table.frame), None)
    if column is None:
        raise FormatError(
            f"{table.place} has no column of tomogram names",
            expected=" or ".join(choices),
            remedy="add the column",
        )
    found = table.frame[column]
    missing = np.flatnonzero((found.isna() | (found == "")).to_numpy(dtype=bool))
    if len(missing):
        raise FormatError(
            f"row {missing[0] + 1} of {table.place} has no {column}",
            expected="the name of a tomogram",
            remedy="correct or remove that row",
        )
    plain = {raw: _without_path(str(raw)) for raw in found.unique()}
    return np.asarray([plain[raw] for raw in found], dtype=np.str_)


def check_name(name: str) -> str:
    """Return a tomogram name that a STAR file can hold."""
    if not name or not name.isprintable() or set(name) & set("\"'#") or name.strip() in {"", *_MISSING}:
        raise FormatError(
            f"the tomogram name {name!r}",
            expected="a name of printable characters without quotes and #, other than nan",
            remedy="name the tomogram: dataclasses.replace(picks, tomogram=...), or pass a mapping of names",
        )
    return name


def _without_path(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    if len(parts) == 1:
        return name
    last = parts[-1]
    for suffix in (".tomostar", ".gz", ".bz2", ".mrc", ".rec", ".map", ".st", ".zarr"):
        last = last.removesuffix(suffix)
    return last or name


def _refuse_repeats(table: Table) -> None:
    repeated = table.frame.columns[table.frame.columns.duplicated()]
    if len(repeated):
        raise FormatError(
            f"{table.place} has the column {repeated[0]} twice",
            expected="each column once",
            remedy="remove one of them",
        )
