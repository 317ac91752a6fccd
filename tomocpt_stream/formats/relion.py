"""The words of RELION's STAR files of particles, and what they mean in numbers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats.extents import Extent

if TYPE_CHECKING:
    from collections.abc import Mapping

Dialect = Literal["relion31", "relion5"]
Floats = npt.NDArray[np.float64]

CENTRED = ["rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst"]
VOXELS = ["rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ"]
COORDINATES: dict[Dialect, list[str]] = {"relion5": CENTRED, "relion31": VOXELS}
NAME: dict[Dialect, str] = {"relion31": "rlnMicrographName", "relion5": "rlnTomoName"}
ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
OWN_ANGLES = ["rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi"]
ORIGIN_ANGSTROM = ["rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst"]
ORIGIN_VOXELS = ["rlnOriginX", "rlnOriginY", "rlnOriginZ"]
SCORE = "rlnAutopickFigureOfMerit"
GROUP = "rlnOpticsGroup"
VOXEL_SIZE = "rlnImagePixelSize"
SERIES_SIZE = "rlnTomoTiltSeriesPixelSize"


def matrices_of(angles: Floats) -> Floats:
    """Return the (n, 3, 3) matrices from particle to tomogram of (n, 3) rot, tilt, psi in degrees."""
    return np.asarray(Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()).reshape(-1, 3, 3)


def angles_of(matrices: Floats) -> Floats:
    """Return rot, tilt, psi in degrees; the inverse of `matrices_of`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gimbal lock: one angle is 0 then, the matrix is right
        try:
            return np.asarray(Rotation.from_matrix(matrices).inv().as_euler("ZYZ", degrees=True))
        except ValueError as error:
            raise FormatError(
                f"rotations that are none ({error})",
                expected="orthogonal matrices of determinant 1",
                remedy="give proper rotations, or none",
            ) from error


def listed(name: str, dialect: Dialect, tomograms: Mapping[str, Extent] | None) -> tuple[str, Extent]:
    """Return a tomogram's name and size as `tomograms` has them.

    RELION 5 knows the tilt series TS_01 whose tomogram is rec_TS_01, and needs to know it.
    """
    if tomograms is None:
        return name, Extent()
    for known in (name, name.removeprefix("rec_")):
        if known in tomograms:
            return known, tomograms[known]
    if dialect == "relion31":
        return name, Extent()
    raise FormatError(
        f"tomogram {name!r} is not among those given: {', '.join(sorted(tomograms)[:10]) or 'none'}",
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
