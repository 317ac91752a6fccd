"""Where the answers for many tomograms go: one name each, nothing twice, no input overwritten."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import quote, unquote, urlsplit

from tomocpt_stream.errors import ActionableError, PlanError, SourceError
from tomocpt_stream.formats import FORMATS, Kind
from tomocpt_stream.pipeline import safe_name
from tomocpt_stream.receipts import local_path
from tomocpt_stream.remote import canonical, is_remote, parent, shown
from tomocpt_stream.tomogram import address_name, open_tomogram

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


Place: TypeAlias = Path | str
"""A path on a disk, or an address, which is text."""


@dataclass(frozen=True)
class Destination:
    """The files of one tomogram's answer; `name` is unlike that of any other one of the run.

    `shared` says that the file of picks takes those of all the tomograms.
    """

    name: str
    picks: Place
    shared: bool
    picture: Place
    heatmap: Place | None


def destinations(
    sources: Sequence[str],
    output: str,
    *,
    heatmaps: Place | None = None,
    inputs: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    kind: Kind = FORMATS["relion31"],
) -> dict[str, Destination]:
    """Return the destination of each tomogram by its source.

    An `output` that ends in the suffix of `kind` takes the picks of all, where one file may; a folder gets
    a file for each, or is a project. Both may be addresses of an object store, and so may `heatmaps`.
    `inputs` are further files, beside the sources, that must stay as they are; `names` are those of
    sources that have one already.

    Raises
    ------
    PlanError
        Where the output is neither, a source is given twice, or an input would be overwritten.
    """
    place, shares = place_of(output), takes_all(output, kind.suffix)
    if shares and kind.folder and len(sources) > 1:
        raise PlanError(
            f"{output} for {len(sources)} tomograms",
            expected=f"a folder: a {kind.suffix} file holds one tomogram",
            remedy="give a folder as --output",
        )
    folder, last = split(place) if shares else (place, "")
    kept = None if heatmaps is None else place_of(str(heatmaps))
    found = {}
    for source, name in unique_names(sources, names).items():
        file = last or f"{name}{kind.suffix}"
        stem = file.removesuffix(kind.suffix)
        picture = f"{stem}_{name}.png" if shares and len(sources) > 1 else f"{stem}.png"
        picks = place if kind.project and not shares else below(folder, file)
        heatmap = None if kept is None else below(kept, f"{name}.zarr")
        found[source] = Destination(name, picks, shares, below(folder, picture), heatmap)
    for one in found.values():
        refuse_overwriting([*sources, *inputs], one.picks, one.picture, one.heatmap)
    return found


def place_of(output: str) -> Place:
    """Return a place for output, a path or the one way to write an address.

    Raises
    ------
    PlanError
        The address of a web server.
    SourceError
        An address that means nothing.
    """
    if not is_remote(output):
        return Path(local_path(output))
    address = canonical(output)
    if address.startswith("http"):
        raise PlanError(
            f"the output {output} on a web server",
            expected="a path, or an address of an object store (s3://, gs://, az://)",
            remedy="write to one of these",
        )
    return address


def takes_all(output: str, wanted: str = ".star") -> bool:
    """Return whether an output is one file for all picks, and not a folder; PlanError for another suffix."""
    place = place_of(output)
    if isinstance(place, Path) and place.is_dir():
        return False
    suffix = place.suffix if isinstance(place, Path) else PurePosixPath(urlsplit(place).path).suffix
    if suffix not in ("", wanted) and not output.endswith("/"):
        raise PlanError(
            f"the output {output}",
            expected=f"a {wanted} file or a folder",
            remedy="end the name of a new folder with a slash",
        )
    return suffix == wanted


def split(place: Place) -> tuple[Place, str]:
    """Return the folder of a file and its name."""
    return (place.parent, place.name) if isinstance(place, Path) else parent(place)


def below(folder: Place, name: str) -> Place:
    """Return the place of a file in a folder."""
    return folder / name if isinstance(folder, Path) else canonical(f"{folder}/{quote(name)}")


def refuse_overwriting(inputs: Sequence[str], *outputs: Place | None) -> None:
    """Raise PlanError where an output is an input or lies inside one (a zarr store is a folder)."""
    taken = {_path_of(source) for source in inputs}
    taken |= {path.resolve() for path in taken}
    for output in outputs:
        if output is None:
            continue
        place = _path_of(str(output))
        every = {place, *place.parents, place.resolve(), *place.resolve().parents}
        if not taken.isdisjoint(every):
            raise PlanError(
                f"the output {output} is an input, or lies inside one",
                expected="inputs that stay as they are",
                remedy="choose another place for the output",
            )


def unique_names(sources: Sequence[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return a name for each source that is safe as a file's and unlike the others.

    Equal ones in one folder keep their suffixes, those in different folders get the folders' names
    in front.
    """
    paths = {source: _path_of(source) for source in sources}
    places = Counter(paths[source].resolve() for source in sources)
    if repeated := [source for source in sources if places[paths[source].resolve()] > 1]:
        raise PlanError(
            f"{shown(repeated[0])} given more than once",
            expected="each tomogram once",
            remedy="leave the repetition out",
        )
    names = {source: safe_name((given or {}).get(source) or _name_of(source)) for source in sources}
    at_home = Counter((paths[source].parent, name.casefold()) for source, name in names.items())
    for source, name in names.items():
        if at_home[paths[source].parent, name.casefold()] > 1:
            names[source] = safe_name(paths[source].name)
    for depth in range(1, max((len(path.parts) for path in paths.values()), default=0)):
        taken = Counter(name.casefold() for name in names.values())
        for source, name in names.items():
            if taken[name.casefold()] > 1 and depth < len(paths[source].parts) - 1:
                names[source] = safe_name(f"{paths[source].parts[-1 - depth]}_{name}")
    return names


def _path_of(source: str) -> Path:
    """Return a path that is equal only for the same place; that of an address begins with its scheme."""
    if not is_remote(source):
        return Path(local_path(source)).absolute()
    with suppress(SourceError):  # which is reported when its turn comes
        source = unquote(canonical(source))
    return Path("//address", source.replace("://", "/", 1))


def _name_of(source: str) -> str:
    """Return what a tomogram calls itself; one that cannot be opened is reported when its turn comes."""
    if is_remote(source):  # which is not asked before its turn comes
        return address_name(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return open_tomogram(source, voxel_size=1.0).name
        except (ActionableError, OSError):
            return Path(source).name
