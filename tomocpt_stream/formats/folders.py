"""Formats of one tomogram a file: a file, or a folder with one for each tomogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tomocpt_stream.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tomocpt_stream.picks import Picks

MOST_FILES = 1_000_000


def file_name(name: str, what: str = "tomogram") -> str:
    """Return a name that can be that of a file, wherever it comes from; another one is an error."""
    unfit = set(name) & set('/\\:*?"<>|') or not name.isprintable() or name != name.strip()
    if not name or unfit or name.startswith(".") or len(name.encode()) > 150:
        raise FormatError(
            f"the {what} name {name!r}",
            expected="a name that a file can have: no slash, no leading dot, at most 150 bytes",
            remedy=f"rename it: dataclasses.replace(picks, {what}=...)",
        )
    return name


def by_tomogram(picks: Sequence[Picks]) -> dict[str, list[Picks]]:
    """Return tables by the name of their tomogram, in order."""
    found: dict[str, list[Picks]] = {}
    for table in picks:
        found.setdefault(table.tomogram, []).append(table)
    return found


def places(picks: Sequence[Picks], name: str, suffix: str) -> dict[str, list[Picks]]:
    """Return what goes into which file: `name` itself where it has the suffix, else files in that folder."""
    tomograms = by_tomogram(picks)
    if not name.lower().endswith(suffix):
        return {f"{name}/{file_name(tomogram)}{suffix}": tables for tomogram, tables in tomograms.items()}
    if len(tomograms) != 1:
        raise FormatError(
            f"picks of {len(tomograms)} tomograms for the one file {name}",
            expected=f"one tomogram in a {suffix} file",
            remedy="give a folder instead: it gets a file for each tomogram",
        )
    return {name: next(iter(tomograms.values()))}


def one_kind(tables: Sequence[Picks], place: str) -> Picks:
    """Return the only table of a file that holds one kind of particle."""
    if len(tables) != 1:
        kinds = ", ".join(repr(table.particle) for table in tables[:10])
        raise FormatError(
            f"{len(tables)} tables of picks for {place}: {kinds}",
            expected="one kind of particle in a file of this format",
            remedy="write each kind to a place of its own: particle= of read_picks, --particle",
        )
    return tables[0]


def files_in(path: Path, suffix: str, pattern: str | None = None) -> list[Path]:
    """Return a file, or the files of a folder that have the suffix, by name."""
    if path.is_file():
        return [path]
    found = sorted(one for one in path.glob(pattern or f"*{suffix}") if one.is_file())
    if not found or len(found) > MOST_FILES:
        raise FormatError(
            f"the folder {path} has {len(found)} files {pattern or '*' + suffix}",
            expected="one for each tomogram",
            remedy="check the path and the format",
        )
    return found
