"""Where the answers for many tomograms go: one name each, nothing twice, no input overwritten."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tomocpt_stream.errors import ActionableError, PlanError, SourceError
from tomocpt_stream.pipeline import safe_name
from tomocpt_stream.remote import canonical, is_remote
from tomocpt_stream.tomogram import address_name, open_tomogram

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Destination:
    """The files of one tomogram's answer; `name` is unlike that of any other one of the run.

    `shares_star` says that the STAR file takes the picks of all the tomograms.
    """

    name: str
    star: Path
    shares_star: bool
    picture: Path
    heatmap: Path | None


def destinations(
    sources: Sequence[str],
    output: str,
    *,
    heatmaps: Path | None = None,
    inputs: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
) -> dict[str, Destination]:
    """Return the destination of each tomogram by its source.

    An `output` that ends in .star takes the picks of all; a folder gets one STAR for each. `inputs`
    are further files, beside the sources, that must stay as they are; `names` are those of sources that
    have one already.

    Raises
    ------
    PlanError
        Where the output is neither, a source is given twice, or an input would be overwritten.
    """
    if is_remote(output):
        raise PlanError(
            f"the output {output}",
            expected="a .star file or a folder on a disk",
            remedy="write there and copy, or use write_picks in Python, which takes addresses",
        )
    place = Path(output)
    shares = place.suffix == ".star" and not place.is_dir()
    if not shares and place.suffix and not place.is_dir() and not output.endswith("/"):
        raise PlanError(
            f"the output {output}",
            expected="a .star file or a folder",
            remedy="end the name of a new folder with a slash",
        )
    found = {}
    for source, name in unique_names(sources, names).items():
        star = place if shares else place / f"{name}.star"
        picture = f"{star.stem}_{name}.png" if shares and len(sources) > 1 else f"{star.stem}.png"
        heatmap = heatmaps / f"{name}.zarr" if heatmaps else None
        found[source] = Destination(name, star, shares, star.with_name(picture), heatmap)
    for one in found.values():
        refuse_overwriting([*sources, *inputs], one.star, one.picture, one.heatmap)
    return found


def refuse_overwriting(inputs: Sequence[str], *outputs: Path | None) -> None:
    """Raise PlanError where an output is an input or lies inside one (a zarr store is a folder)."""
    taken = {Path(source.removeprefix("file://")).resolve() for source in inputs}
    for output in outputs:
        if output is not None and not taken.isdisjoint((output.resolve(), *output.resolve().parents)):
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
    if repeated := [str(place) for place, times in places.items() if times > 1]:
        raise PlanError(
            f"{', '.join(repeated)} given more than once",
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
        return Path(source.removeprefix("file://")).absolute()
    with suppress(SourceError):  # which is reported when its turn comes
        source = unquote(canonical(source))
    return Path("/", source)


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
