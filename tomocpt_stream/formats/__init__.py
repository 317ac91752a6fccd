"""Coordinate files in and out: one module a format, chosen by suffix and content or by name.

Each module that is named in `FORMATS` has one or both of
    read(path, format, asked)       format is None where only the suffix is known
        -> dict[str, Picks] by tomogram, or list[Picks], one for each tomogram and kind of particle
    render(picks, format, asked, name) -> dict[str, bytes]  files by their names beside, or in, `name`
Names in a file are names: none of them is opened as a path. What the functions need is imported in them,
so that the commands know the formats without loading any.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tomocpt_stream.errors import FormatError
from tomocpt_stream.whole import write_together

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.formats.extents import Tomograms
    from tomocpt_stream.frame import Shape
    from tomocpt_stream.picks import Picks

__all__ = [
    "FORMATS",
    "Format",
    "Kind",
    "companions",
    "places_of",
    "read_kinds",
    "read_picks",
    "render_picks",
    "store_files",
    "write_picks",
]

Format = str
SCORES = ".scores.csv"


@dataclass(frozen=True)
class Kind:
    """One format: the module that knows it, the suffixes that mean it, what is done with it.

    `folder` says that it may be a folder of files, `beside` that scores may lie beside a file, `written`
    is the suffix that a file gets where it means another format, `project` that a folder is one of a
    program's own, with files below it.
    """

    module: str
    suffixes: tuple[str, ...]
    reads: bool = True
    writes: bool = True
    folder: bool = False
    beside: bool = False
    written: str = ""
    project: bool = False

    @property
    def suffix(self) -> str:
        """The suffix of a file that is written in this format."""
        return self.written or self.suffixes[0]


FORMATS: dict[Format, Kind] = {
    "relion31": Kind("star", (".star",)),
    "relion5": Kind("star", (".star",)),
    "relion5-picker": Kind("star", (".star",)),
    "relion4": Kind("star", (".star",)),
    "warp": Kind("star", (".star",)),
    "relion30": Kind("star", (".star",), writes=False),
    "m": Kind("star", (".star",), writes=False),
    "stopgap": Kind("star", (".star",), writes=False),
    "tomoman": Kind("star", (".star",), writes=False),
    "imod": Kind("imod", (".mod",), folder=True),
    "imod_slicer": Kind("imod", (), writes=False, folder=True),
    "copick": Kind("copick", (".json",), folder=True, project=True),
    "ndjson": Kind("portal_points", (".ndjson",), folder=True, beside=True),
    "csv": Kind("csv_dialects", (".csv",), beside=True),
    "tsv": Kind("csv_dialects", (".tsv",)),
    "czii": Kind("csv_dialects", (), beside=True, written=".csv"),
    "tardis": Kind("csv_dialects", (), writes=False),
    "portal_csv": Kind("csv_dialects", (), folder=True, beside=True, written=".csv"),
    "napari": Kind("napari", (), written=".csv"),
    "dynamo": Kind("dynamo", (".tbl",), writes=False),
    "coords": Kind("coords", (".coords",), folder=True, beside=True),
    "deepetpicker": Kind("coords", (), folder=True, beside=True, written=".coords"),
}
"""Every format by name; where several have a suffix, the first one is what is written without a name."""


def read_picks(  # noqa: PLR0913  (the public signature of the design)
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002  (the public signature of the design)
    voxel_size: float | None = None,
    shape: Shape | None = None,
    tomograms: Tomograms | None = None,
    half_voxel: bool = True,
    base_index: int | None = None,
    pixel_size: float | None = None,
    mean_binned: bool = False,
    name_pattern: str | None = None,
    particle: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Picks]:
    """Read the picks of a coordinate file, by tomogram name, in the order of their rows.

    `path` may be the address of a file, with `storage_options` as those of `remote.connect`.
    `voxel_size` (Å) and `shape` (z, y, x) are those of the tomogram whose voxels the picks come in;
    `tomograms` gives them by name: a tomograms.star, Warp's .settings or *.tomostar, several of these,
    or a mapping from names to (shape, voxel_size), Picks or Tomograms; or a Dynamo .doc, which only names
    tomograms. `pixel_size` (Å) is what the file's coordinates count where that is not voxels of the
    tomogram: the tilt series' pixels, mostly. `mean_binned` and `name_pattern` are those of `Asked`. An
    argument comes before what the file says. Picks of a file without scores have score 1. `particle` is
    the kind of particle that is wanted, of a file that has several; a number is a class of a STAR file,
    whose classes are one table without it.

    Raises
    ------
    FormatError
        The file is not of a known format, has a row that cannot be read, or does not say something
        that is needed and was not passed.
    """
    asked = _asked(
        tomograms,
        voxel_size=voxel_size,
        shape=shape,
        half_voxel=half_voxel,
        base_index=base_index,
        pixel_size=pixel_size,
        mean_binned=mean_binned,
        name_pattern=name_pattern,
        particle=particle,
    )
    tables = _read(path, format, asked, storage_options)
    if particle is not None:
        kinds = sorted({table.particle for table in tables})
        tables = [table for table in tables if table.particle == particle]
        if not tables:
            raise FormatError(
                f"{path} has no picks of {particle!r}",
                expected=f"one of its kinds: {', '.join(map(repr, kinds[:20])) or 'none'}",
                remedy="choose one of them",
            )
    found: dict[str, Picks] = {}
    for table in tables:
        if found.setdefault(table.tomogram, table) is not table:
            kinds = [one.particle for one in tables if one.tomogram == table.tomogram]
            raise FormatError(
                f"{path} has {len(kinds)} kinds of particles in {table.tomogram}: "
                f"{', '.join(map(repr, kinds[:20]))}",
                expected="one kind in each tomogram",
                remedy="pass particle= (--particle), one of them",
            )
    return found


def read_kinds(
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002
    tomograms: Tomograms | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Picks]:
    """Read all picks of a coordinate file: a table for each tomogram and kind of particle.

    Options and errors are those of `read_picks`; `particle` only chooses a STAR file's class.
    """
    return _read(path, format, _asked(tomograms, **options), storage_options)


def write_picks(  # noqa: PLR0913  (the public signature of the design)
    picks: Picks | Mapping[str, Picks] | Iterable[Picks],
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002  (the public signature of the design)
    tomograms: Tomograms | None = None,
    half_voxel: bool = True,
    base_index: int | None = None,
    pixel_size: float | None = None,
    mean_binned: bool = False,
    name_pattern: str | None = None,
    optimisation_set: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Write picks of one or several tomograms; each file appears whole or not at all.

    `path` may be an address (s3://, gs://, az://), with `storage_options` as those of `remote.connect`. A
    mapping names the tomograms by its keys. A file that is there already is replaced. "relion5"
    needs the size of each tomogram, from its picks or from `tomograms` (see `read_picks`), "relion4" the
    unbinned pixel size of the tilt series, from `pixel_size` (Å) or `tomograms`. `optimisation_set` also
    writes RELION's optimisation_set.star beside a file whose `tomograms` are a tomograms.star. In formats
    of one tomogram a file, a `path` without the suffix is a folder that gets a file for each.

    Raises
    ------
    FormatError
        The format is not known, or the picks lack something that it must state.
    """
    folder, files = _rendered(
        picks,
        path,
        format,
        tomograms,
        half_voxel=half_voxel,
        base_index=base_index,
        pixel_size=pixel_size,
        mean_binned=mean_binned,
        name_pattern=name_pattern,
        companion=_companion(path, tomograms) if optimisation_set else None,
    )
    _put(folder, files, storage_options)


def store_files(
    path: str | Path, files: Mapping[str, bytes], storage_options: Mapping[str, Any] | None = None
) -> None:
    """Store the files that `render_picks` returned for `path`, all of them or, on a disk, none."""
    _put(_place(path)[0], files, storage_options)


def places_of(path: str | Path, files: Iterable[str]) -> list[str]:
    """Return the paths or addresses of the files that `render_picks` returned for `path`."""
    folder = _place(path)[0]
    return [f"{folder}/{quote(name)}" if isinstance(folder, str) else str(folder / name) for name in files]


def companions(path: str | Path) -> list[str]:
    """Return the paths or addresses of what may be read beside a file of picks: scores, an annotation."""
    place = str(path)
    found = [f"{place}{SCORES}"]
    if place.lower().endswith(".ndjson"):
        from tomocpt_stream.formats.portal_points import annotation_name

        found.append(annotation_name(place))
    return found


def render_picks(
    picks: Picks | Mapping[str, Picks] | Iterable[Picks],
    path: str | Path,
    *,
    format: Format | None = None,  # noqa: A002
    tomograms: Tomograms | None = None,
    optimisation_set: bool = False,
    **options: Any,
) -> dict[str, bytes]:
    """Return the files that `write_picks` would write, by their names beside or in `path`.

    Options and errors are those of `write_picks`.
    """
    companion = _companion(path, tomograms) if optimisation_set else None
    return _rendered(picks, path, format, tomograms, companion=companion, **options)[1]


def _rendered(
    picks: Picks | Mapping[str, Picks] | Iterable[Picks],
    path: str | Path,
    name: Format | None,
    tomograms: Tomograms | None,
    **options: Any,
) -> tuple[str | Path, dict[str, bytes]]:
    kind = _known(name, path, writing=True)
    named = name or next(one for one, other in FORMATS.items() if other == kind)
    folder, last = _place(path)
    files: dict[str, bytes] = _module(kind).render(_named(picks), named, _asked(tomograms, **options), last)
    return folder, files


def _asked(tomograms: Tomograms | None, **options: Any) -> Asked:
    from tomocpt_stream.formats.asked import Asked
    from tomocpt_stream.formats.extents import tomogram_extents

    if isinstance(tomograms, str | Path) and Path(tomograms).suffix.lower() == ".doc":
        from tomocpt_stream.formats.dynamo import read_doc

        return Asked(numbers=read_doc(Path(tomograms)), **options)
    return Asked(tomograms=None if tomograms is None else tomogram_extents(tomograms), **options)


def _read(
    path: str | Path, name: Format | None, asked: Asked, storage_options: Mapping[str, Any] | None
) -> list[Picks]:
    kind = _known(name, path, writing=False)
    with _at_hand(path, kind, storage_options) as file:
        found = _module(kind).read(file, name, asked)
    return list(found.values() if isinstance(found, Mapping) else found)


@contextmanager
def _at_hand(path: str | Path, kind: Kind, storage_options: Mapping[str, Any] | None) -> Iterator[Path]:
    """Yield the path of a file; what lies at an address is fetched, and errors say the address."""
    from tomocpt_stream.receipts import get_object, local_path
    from tomocpt_stream.remote import is_remote

    if not (isinstance(path, str) and is_remote(path)):
        there = Path(local_path(path))
        if not (there.is_file() or (kind.folder and there.is_dir())):
            raise FormatError(f"no file {path}", expected="a coordinate file", remedy="check the path")
        yield there
        return
    data = get_object(path, storage_options, FormatError)
    if data is None:
        raise FormatError(f"no object {path}", expected="a coordinate file", remedy="check the address")
    with tempfile.TemporaryDirectory(prefix="tomocpt-stream-") as folder:
        file = Path(folder, _place(path)[1])
        file.write_bytes(data)
        if kind.beside:
            for address, beside in zip(companions(path), companions(file), strict=True):
                _fetch_beside(address, Path(beside), storage_options)
        try:
            yield file
        except FormatError as error:
            found, expected, remedy = (
                text.replace(str(file), path) for text in (error.found, error.expected, error.remedy)
            )
            raise FormatError(found, expected=expected, remedy=remedy) from error


def _fetch_beside(address: str, file: Path, storage_options: Mapping[str, Any] | None) -> None:
    """Fetch what lies beside an address, if it is there; a store may refuse what is not."""
    from tomocpt_stream.receipts import get_object

    try:
        data = get_object(address, storage_options, FormatError)
    except FormatError as error:
        what = "scores" if address.endswith(SCORES) else "annotation"
        warnings.warn(f"read without {what}: {error}", stacklevel=5)
        return
    if data is not None:
        file.write_bytes(data)


def _companion(path: str | Path, tomograms: Tomograms | None) -> tuple[str, str]:
    """Return the files that an optimisation set names, as they were called."""
    if not isinstance(tomograms, str | Path) or Path(tomograms).suffix.lower() != ".star":
        raise FormatError(
            "an optimisation set without a tomograms.star",
            expected="tomograms= (--tomograms): the tomograms.star that the picks belong to",
            remedy="pass it, or write no optimisation set",
        )
    return str(path), str(tomograms)


def _named(picks: Picks | Mapping[str, Picks] | Iterable[Picks]) -> list[Picks]:
    if isinstance(picks, Mapping):
        return [replace(table, tomogram=name) for name, table in picks.items()]
    return list(picks) if isinstance(picks, Iterable) else [picks]


def _known(name: Format | None, path: str | Path, *, writing: bool) -> Kind:
    """Return the format of a name or of a path's suffix, or refuse it."""
    able = {one: kind for one, kind in FORMATS.items() if (kind.writes if writing else kind.reads)}
    if name is not None:
        if name not in able:
            verb = "written" if writing else "read"
            raise FormatError(
                f"format {name!r}",
                expected=f"one of those that are {verb}: {', '.join(able)}",
                remedy="choose one of them",
            )
        return able[name]
    from tomocpt_stream.remote import shown

    plain = shown(str(path))  # a query of an address is refused where it is opened, and may be secret
    suffix = Path(plain).suffix.lower()
    for kind in able.values():
        if suffix in kind.suffixes:
            return kind
    option = "--to" if writing else "--from, of view --format"
    suffixes = dict.fromkeys(suffix for kind in able.values() for suffix in kind.suffixes)
    raise FormatError(
        f"{plain} with suffix {suffix!r}",
        expected=f"a suffix that says the format: {', '.join(filter(None, suffixes))}",
        remedy=f"rename the file, or pass format= ({option}; one of {', '.join(able)})",
    )


def _module(kind: Kind) -> Any:
    return importlib.import_module(f"{__name__}.{kind.module}")


def _place(path: str | Path) -> tuple[str | Path, str]:
    from tomocpt_stream.receipts import local_path
    from tomocpt_stream.remote import canonical, is_remote, parent

    if isinstance(path, str) and is_remote(path):
        return parent(canonical(path))
    found = Path(local_path(path))
    if found.name in ("", ".."):  # "." has no name of its own, and "/x" is not in it
        found = found.resolve()
    if not found.name:
        raise FormatError(f"the path {path}", expected="a file or a folder with a name", remedy="give one")
    return found.parent, found.name


def _put(
    folder: str | Path, files: Mapping[str, bytes], storage_options: Mapping[str, Any] | None = None
) -> None:
    """Store files on a disk, where none takes its name before all are whole, or on an object store."""
    if isinstance(folder, str):
        from tomocpt_stream.receipts import put_object

        for name, data in files.items():
            put_object(f"{folder}/{quote(name)}", data, storage_options, FormatError)
        return
    paths = {folder / name: data for name, data in files.items()}
    _refuse_obstructed(paths)
    write_together(paths)


def _refuse_obstructed(paths: Iterable[Path]) -> None:
    """Refuse files where a folder is, and folders where a file is."""
    for path in paths:
        if path.is_dir():
            raise FormatError(
                f"{path}, which is a folder",
                expected="a file of picks",
                remedy="give the name of a file in it, or choose another",
            )
        above = next((one for one in path.parents if one.exists()), None)
        if above is not None and not above.is_dir():
            raise FormatError(
                f"{above}, which is a file and no folder",
                expected=f"a folder for {path.name}",
                remedy="give the suffix of the format for one file, or the name of a folder",
            )
