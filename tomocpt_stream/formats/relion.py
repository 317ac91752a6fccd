"""The words of RELION's STAR files of particles, and what they mean in numbers."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError

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
