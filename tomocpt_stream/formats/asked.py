"""What a caller says of the tomograms that a coordinate file is about, because the file may not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.extents import Extent, extent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tomocpt_stream.frame import Shape


@dataclass(frozen=True)
class Asked:
    """Sizes of the tomograms, and the choices that a format leaves open.

    `voxel_size` (Å) and `shape` (z, y, x) hold for every tomogram of the file; `tomograms` has sizes by
    name. `half_voxel`: IMOD's centre of the first voxel is (0.5, 0.5, 0) in x, y, z, not 0.
    `base_index`: what the first voxel is called, 0 or 1, in a file that counts from either.
    """

    voxel_size: float | None = None
    shape: Shape | None = None
    tomograms: Mapping[str, Extent] | None = None
    half_voxel: bool = True
    base_index: int | None = None

    def known(self, name: str) -> tuple[str, Extent] | None:
        """Return a tomogram's name and size as `tomograms` has them, None where it does not.

        Programs put rec_ before the name of a tilt series where they mean its tomogram.
        """
        for known in (name, name.removeprefix("rec_")):
            if self.tomograms is not None and known in self.tomograms:
                return known, self.tomograms[known]
        return None

    def of(self, name: str, said: float | None = None) -> Extent:
        """Return the size of a tomogram: as asked for, as listed, or as the file `said` (Å)."""
        found = self.known(name)
        known = Extent() if found is None else found[1]
        voxel_size = self.voxel_size or known.voxel_size or said
        shape = self.shape or known.shape
        if known.pixel_size is None:
            return extent(shape, voxel_size)
        return replace(known, shape=shape, voxel_size=voxel_size)

    def listed(self, name: str) -> str:
        """Return a tomogram's name as `tomograms` has it; one that is not there is an error."""
        found = self.known(name)
        if found is not None or self.tomograms is None:
            return name if found is None else found[0]
        raise FormatError(
            f"tomogram {name!r} is not among those given: {', '.join(sorted(self.tomograms)[:10]) or 'none'}",
            expected="a size for every tomogram of the file",
            remedy="add it to tomograms, or rename the picks",
        )


def lacking(name: str, place: str, what: str, option: str) -> FormatError:
    """Return the error for a size that nobody said."""
    return FormatError(
        f"{place} does not say the {what} of tomogram {name}",
        expected=f"its {what}: positions depend on it",
        remedy=f"pass {option}, or tomograms= (a tomograms.star, or names to (shape, voxel_size))",
    )
