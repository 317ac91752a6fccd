"""What a caller says of the tomograms that a coordinate file is about, because the file may not."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.extents import Extent, Listed, with_voxels
from tomocpt_stream.formats.series_names import series_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tomocpt_stream.frame import Shape


@dataclass(frozen=True)
class Asked:
    """Sizes of the tomograms, and the choices that a format leaves open.

    `voxel_size` (Å) and `shape` (z, y, x) hold for every tomogram of the file; `tomograms` has sizes by
    name. `half_voxel`: IMOD's centre of the first voxel is (0.5, 0.5, 0) in x, y, z, not 0.
    `base_index`: what the first voxel is called, 0 or 1, in a file that counts from either.
    `pixel_size` (Å): what the coordinates of the file count where it is not voxels of the tomogram, the
    tilt series' pixels above all. `mean_binned`: voxel i of a tomogram binned by b is the mean of its
    pixels, at i·b + (b - 1)/2, not at i·b. `name_pattern` is that of `series_name`. `companion`: the
    files of particles and tomograms that an optimisation_set.star is to name. `numbers`: the names of
    tomograms in a file that has numbers for them. `radius`: of the spheres that a viewer shows, voxels.
    `particle`: the kind that is wanted, for files whose rows have kinds only for those who ask.
    """

    voxel_size: float | None = None
    shape: Shape | None = None
    tomograms: Listed | None = None
    half_voxel: bool = True
    base_index: int | None = None
    _: KW_ONLY
    pixel_size: float | None = None
    mean_binned: bool = False
    name_pattern: str | None = None
    companion: tuple[str, str] | None = None
    numbers: Mapping[int, str] | None = None
    radius: int = 5
    particle: str | None = None

    def __post_init__(self) -> None:
        for name, size in (("voxel_size", self.voxel_size), ("pixel_size", self.pixel_size)):
            if size is not None and not (math.isfinite(size) and size > 0):
                raise FormatError(f"{name} {size}", expected="a positive number, Å", remedy="correct it")

    def known(self, name: str) -> tuple[str, Extent] | None:
        """Return a tomogram's name and size as `tomograms` has them, None where it does not.

        A tomogram may be listed under its own name, under that of its tilt series, or under any other
        that comes from it by what programs add to names. Two of the last are an error.
        """
        if self.tomograms is None:
            return None
        extents = self.tomograms
        if name in extents:
            return name, extents[name]
        series = series_name(name, self.name_pattern)
        if series in extents:
            return series, extents[series]
        found = self._by_series.get(series_name(series), [])
        if len(found) > 1:
            raise FormatError(
                f"tomogram {name!r} may be any of {', '.join(found[:10])}",
                expected="one tomogram for each tilt series",
                remedy="name them alike, or list each tilt series once",
            )
        return (found[0], extents[found[0]]) if found else None

    @cached_property
    def _by_series(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for listed in self.tomograms or ():
            found.setdefault(series_name(listed), []).append(listed)
        return found

    def of(self, name: str, said: float | None = None) -> Extent:
        """Return the size of a tomogram: as asked for, as listed, or as the file `said` (Å)."""
        found = self.known(name)
        every = Extent() if self.tomograms is None else self.tomograms.every
        known = every if found is None else found[1]
        return with_voxels(known, self.shape, self.voxel_size or known.voxel_size or said)

    def names(self, tomograms: Iterable[str], *, series: bool, needed: bool) -> dict[str, str]:
        """Return what each tomogram is called: as listed, else as it is, or by its tilt series.

        Tomograms that are in no list of tilt series are an error, and where their size is `needed` in
        no list at all; so are two with one name.
        """
        tomograms = list(tomograms)
        listed = Listed() if self.tomograms is None else self.tomograms
        found = {name: self.known(name) for name in tomograms}
        missing = [name for name, known in found.items() if known is None]
        if missing and listed and (listed.series or needed):
            raise FormatError(
                f"tomogram {', '.join(map(repr, missing[:10]))} is not among those given: "
                f"{', '.join(sorted(listed)[:10]) or 'none'}",
                expected="tomograms that are listed, by their names or those of their tilt series",
                remedy="pass name_pattern= (--name-pattern), add them to tomograms, or rename the picks",
            )
        called: dict[str, str] = {}
        for name, known in found.items():
            if known is not None and (listed.series or not series):
                called[name] = known[0]
            else:
                called[name] = series_name(name, self.name_pattern) if series else name
        _refuse_twins(called)
        return called


def _refuse_twins(called: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for name, series in called.items():
        if first.setdefault(series, name) != name:
            raise FormatError(
                f"tomograms {first[series]!r} and {name!r}, both of the tilt series {series!r}",
                expected="one tomogram for each tilt series",
                remedy="write one of them, or tell them apart by name_pattern= (--name-pattern)",
            )


def lacking(name: str, place: str, what: str, option: str) -> FormatError:
    """Return the error for a size that nobody said."""
    return FormatError(
        f"{place} does not say the {what} of tomogram {name}",
        expected=f"its {what}: positions depend on it",
        remedy=f"pass {option}, or tomograms= (--tomograms): tomograms.star, .settings, names to sizes",
    )
