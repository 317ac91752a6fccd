"""Coordinate files in and out: one module a format, chosen by suffix and content or by name.

Formats: "relion31" (RELION 3.0 and 3.1 STAR, tomogram voxels; what .star means without a name) and
"relion5" (RELION 5 STAR, centred Å). Names in a file are names: none of them is opened as a path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.extents import Tomograms, tomogram_extents
from tomocpt_stream.formats.star import read_star, render_star
from tomocpt_stream.patience import PatientStore
from tomocpt_stream.picks import Picks
from tomocpt_stream.receipts import write_bytes
from tomocpt_stream.remote import connect, is_remote, parent

if TYPE_CHECKING:
    from tomocpt_stream.frame import Shape

__all__ = ["Format", "read_picks", "write_picks"]

Format = Literal["relion31", "relion5"]

_FORMATS: tuple[Format, ...] = get_args(Format)


def read_picks(
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002  (the public signature of the design)
    voxel_size: float | None = None,
    shape: Shape | None = None,
    tomograms: Tomograms | None = None,
) -> dict[str, Picks]:
    """Read the picks of a coordinate file, by tomogram name, in the order of their rows.

    `voxel_size` (Å) and `shape` (z, y, x) are those of the tomogram whose voxels the picks come in;
    `tomograms` gives them by name: a RELION 5 tomograms.star, or a mapping from names to
    (shape, voxel_size), Picks or Tomograms. An argument comes before what the file says. Picks of a
    file without scores have score 1.

    Raises
    ------
    FormatError
        The file is not of a known format, has a row that cannot be read, or does not say something
        that is needed and was not passed.
    """
    _known(format, path)
    if not Path(path).is_file():
        raise FormatError(f"no file {path}", expected="a coordinate file", remedy="check the path")
    sizes = None if tomograms is None else tomogram_extents(tomograms)
    return read_star(Path(path), dialect=format, voxel_size=voxel_size, shape=shape, tomograms=sizes)


def write_picks(
    picks: Picks | Mapping[str, Picks] | Iterable[Picks],
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002  (the public signature of the design)
    tomograms: Tomograms | None = None,
) -> None:
    """Write picks of one or several tomograms to one file; it appears whole or not at all.

    `path` may be an address (s3://, gs://, az://), with credentials from the environment. A mapping
    names the tomograms by its keys. A file that is there already is replaced. "relion5"
    needs the size of each tomogram, from its picks or from `tomograms` (see `read_picks`).

    Raises
    ------
    FormatError
        The format is not known, or the picks lack something that it must state.
    """
    dialect = _known(format, path)
    sizes = None if tomograms is None else tomogram_extents(tomograms)
    text = render_star(_named(picks), dialect, sizes)
    if isinstance(path, str) and is_remote(path):
        folder, name = parent(path)
        write_bytes(PatientStore(connect(folder, read_only=False), FormatError), name, text.encode())
    else:
        _write_whole(Path(path), text)


def _named(picks: Picks | Mapping[str, Picks] | Iterable[Picks]) -> list[Picks]:
    if isinstance(picks, Picks):
        return [picks]
    if isinstance(picks, Mapping):
        return [replace(table, tomogram=name) for name, table in picks.items()]
    return list(picks)


def _known(name: Format | None, path: str | Path) -> Format:
    """Return the format of a path, or refuse it."""
    if name is not None and name not in _FORMATS:
        raise FormatError(
            f"format {name!r}", expected=f"one of {', '.join(_FORMATS)}", remedy="choose one of them"
        )
    if name is None and Path(path).suffix.lower() != ".star":
        raise FormatError(
            f"{path} with suffix {Path(path).suffix!r}",
            expected="a suffix that says the format: .star",
            remedy=f"rename the file, or pass format= ({', '.join(_FORMATS)})",
        )
    return name or "relion31"


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
