"""From the name of a tomogram to that of its tilt series, which RELION and Warp want."""

from __future__ import annotations

import re

from tomocpt_stream.errors import FormatError

_SUFFIXES = (".tomostar", ".gz", ".bz2", ".mrc", ".rec", ".map", ".st", ".zarr")
_PIXEL_SIZE = re.compile(r"_[0-9]+(\.[0-9]+)?Apx$")


def without_suffixes(name: str) -> str:
    """Return a file's name without the suffixes of tomograms and tilt series."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def series_name(name: str, pattern: str | None = None) -> str:
    """Return the name of a tomogram's tilt series.

    Without a pattern, what programs add is taken off as often as it is there: the suffixes of files,
    rec_ in front, _Vol and _<number>Apx at the end. A pattern is the tomogram's name with {} where the
    name of the tilt series is, and * for anything: "{}_bin4_*". Where it fits in several ways, the
    longest series counts. Raises FormatError where the pattern does not fit.
    """
    if pattern is not None:
        found = _between(name, pattern)
        if not found:
            raise FormatError(
                f"tomogram {name!r} does not fit the name pattern {pattern!r}",
                expected="a pattern that fits the names of all tomograms",
                remedy="correct the pattern: {} stands for the tilt series' name, * for anything",
            )
        return found
    before = ""
    while name != before:
        before = name
        shorter = _PIXEL_SIZE.sub("", without_suffixes(name)).removesuffix("_Vol").removeprefix("rec_")
        name = shorter or name
    return name


def _between(name: str, pattern: str) -> str:
    """Return the longest part of a name that {} of the pattern may stand for, "" where there is none."""
    if pattern.count("{}") != 1:
        raise FormatError(
            f"the name pattern {pattern!r}",
            expected="{} once, for the tilt series' name, and * for anything",
            remedy='write it like "{}_bin4_*"',
        )
    before, after = pattern.split("{}")
    start, end = _passed(name, before), _passed(name[::-1], after[::-1])
    return "" if start is None or end is None else name[start : len(name) - end]


def _passed(name: str, pattern: str) -> int | None:
    """Return how little of a name's start a pattern takes; searching each piece in turn takes no more."""
    first, *pieces = pattern.split("*")
    if not name.startswith(first):
        return None
    at = len(first)
    for piece in pieces:
        found = name.find(piece, at)
        if found < 0:
            return None
        at = found + len(piece)
    return at
