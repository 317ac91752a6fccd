"""The words of STAR files of particles, and what they mean: one `Dialect` for each program."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError

Floats = npt.NDArray[np.float64]
Frame = Literal["tomogram", "export", "series", "centred", "angstrom"]
Angles = Literal["relion", "stopgap"]

SCORE = "rlnAutopickFigureOfMerit"
GROUP = "rlnOpticsGroup"
CLASS = "rlnClassNumber"
VOXEL_SIZE = "rlnImagePixelSize"
OWN_VOXEL_SIZE = "rlnPixelSize"
SERIES_SIZE = "rlnTomoTiltSeriesPixelSize"
OWN_ANGLES = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi")
ORIGIN_ANGSTROM = ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst")
ORIGIN_PIXELS = ("rlnOriginX", "rlnOriginY", "rlnOriginZ")

_VOXELS = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ")
_CENTRED = ("rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst")
_MICROGRAPH, _TOMOGRAM = "rlnMicrographName", "rlnTomoName"


@dataclass(frozen=True)
class Dialect:
    """How one program writes particles; columns are x, y, z.

    `frame` says what a coordinate counts: voxels of the tomogram it was picked in, voxels of a tomogram
    as Warp reconstructs and reads it, unbinned pixels of the tilt series, Å from the tomogram's centre, Å
    from its first voxel. `shift` is added to it. `names` are columns of tomogram names, the first one is
    written; `series` says that the name of the tilt series is meant. `nearer` is by how many unbinned
    pixels the centre is nearer to the first voxel than half the size.
    """

    frame: Frame
    coordinates: tuple[str, str, str] = _VOXELS
    names: tuple[str, ...] = (_MICROGRAPH, _TOMOGRAM)
    series: bool = False
    suffix: str = ""
    angles: tuple[str, str, str] = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    convention: Angles = "relion"
    shift: tuple[str, str, str] | None = None
    score: str = SCORE
    nearer: float = 0.0
    version: str = "30001"


_RELION5 = Dialect("centred", _CENTRED, (_TOMOGRAM, _MICROGRAPH), series=True, version="50001")

DIALECTS: dict[str, Dialect] = {
    "relion31": Dialect("tomogram"),
    "relion5": _RELION5,
    "relion5-picker": Dialect(**{**vars(_RELION5), "nearer": 1.0}),
    "relion4": Dialect("series", names=(_TOMOGRAM, _MICROGRAPH), series=True),
    "warp": Dialect("export", series=True, suffix=".tomostar"),
    "relion30": Dialect("tomogram"),
    "m": Dialect(
        "angstrom",
        ("wrpCoordinateX1", "wrpCoordinateY1", "wrpCoordinateZ1"),
        ("wrpSourceName",),
        series=True,
        angles=("wrpAngleRot1", "wrpAngleTilt1", "wrpAnglePsi1"),
    ),
    "stopgap": Dialect(
        "tomogram",
        ("orig_x", "orig_y", "orig_z"),
        ("tomo_num",),
        angles=("psi", "the", "phi"),
        convention="stopgap",
        shift=("x_shift", "y_shift", "z_shift"),
        score="score",
    ),
    "tomoman": Dialect("tomogram", names=(_TOMOGRAM, _MICROGRAPH), series=True),
}

NUMBERS = {
    *(GROUP, CLASS, VOXEL_SIZE, OWN_VOXEL_SIZE, SERIES_SIZE),
    *OWN_ANGLES,
    *ORIGIN_ANGSTROM,
    *ORIGIN_PIXELS,
    *(
        column
        for one in DIALECTS.values()
        for column in (*one.coordinates, *one.angles, *(one.shift or ()), one.score)
    ),
}
NAMES = {name for one in DIALECTS.values() for name in one.names}


def matrices_of(angles: Floats, convention: Angles = "relion") -> Floats:
    """Return the (n, 3, 3) matrices from particle to tomogram of (n, 3) angles in degrees.

    "relion": rot, tilt, psi, the inverse of Rz(rot)·Ry(tilt)·Rz(psi). "stopgap": psi, the, phi,
    Rz(psi)·Rx(the)·Rz(phi).
    """
    turns = Rotation.from_euler("ZYZ" if convention == "relion" else "ZXZ", angles, degrees=True)
    turns = turns.inv() if convention == "relion" else turns
    return np.asarray(turns.as_matrix()).reshape(-1, 3, 3)


def angles_of(matrices: Floats) -> Floats:
    """Return RELION's rot, tilt, psi in degrees; the inverse of `matrices_of`."""
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
