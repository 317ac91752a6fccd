"""What the network is taught to answer: a peak at every centroid (paper section 2.1, equations 1 to 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tomocpt_stream.frame import Box, Shape
    from tomocpt_stream.picks import Picks

Label = Literal["gaussian", "binary"]

LABELS: tuple[Label, ...] = ("gaussian", "binary")
# f1 and f2 of equation 2: three sigma of either Gaussian as a fraction of the particle's radius.
WIDTHS = (0.95, 0.5)


def paint_targets(
    picks: Picks, shape: Shape, *, diameter: float, voxel_size: float, label: Label = "gaussian"
) -> npt.NDArray[np.float32]:
    """Return the label volume of `shape` (z, y, x) for particles of `diameter` Å.

    `picks.zyx` is in voxels of the volume painted, at any sub-voxel position, and `voxel_size` (Å) is
    that of the same volume. A particle at or beyond a face paints the voxels that it reaches.
    """
    box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    return paint_box(picks.zyx, box, radius=diameter / voxel_size / 2, label=label)


def paint_box(
    centres: npt.ArrayLike,
    box: Box,
    *,
    radius: float,
    label: Label = "gaussian",
    widths: tuple[float, float] = WIDTHS,
) -> npt.NDArray[np.float32]:
    """Return the voxels of `box` of the label of a larger volume, which is never stored whole.

    `centres` is (n, 3) zyx voxels of that volume, `radius` in voxels, `widths` f1 and f2 of equation 2.
    "gaussian": equation 1 over its maximum 2 at the centre, cut at r = R (equation 3), the particles
    combined by the maximum (equation 4). "binary": 1 where r <= R.
    """
    if label not in LABELS:
        raise FormatError(
            f"label {label!r}", expected=" or ".join(LABELS), remedy="ask for one of these two labels"
        )
    if not radius > 0:
        raise FormatError(
            f"a radius of {radius} voxels",
            expected="a positive radius",
            remedy="check diameter and voxel size",
        )
    painted = np.zeros([side.stop - side.start for side in box], dtype=np.float32)
    for cut, squared in _cubes(centres, box, radius):
        np.maximum(painted[cut], _profile(squared, radius, label, widths), out=painted[cut])
    return painted


def squared_distances(centres: npt.ArrayLike, box: Box, reach: float) -> npt.NDArray[np.float32]:
    """Return the squared distance (voxels²) of each voxel of `box` to the nearest of `centres`.

    Beyond `reach` voxels it may be infinite. `centres` is (n, 3) zyx voxels of the larger volume.
    """
    nearest = np.full([side.stop - side.start for side in box], np.inf, dtype=np.float32)
    for cut, squared in _cubes(centres, box, reach):
        np.minimum(nearest[cut], squared, out=nearest[cut], casting="same_kind")
    return nearest


def _cubes(centres: npt.ArrayLike, box: Box, radius: float) -> Iterator[tuple[Box, npt.NDArray[np.float64]]]:
    """Yield for each centre the voxels of `box` about its sphere, and their squared distances from it."""
    start = np.array([side.start for side in box], dtype=np.float64)
    shape = np.array([side.stop - side.start for side in box])
    points = np.asarray(centres, dtype=np.float64).reshape(-1, 3) - start
    # Within the box before they are integers: a place may lie farther away than an integer can say.
    lows = np.clip(np.ceil(points - radius), 0, shape).astype(np.int64)
    highs = np.clip(np.floor(points + radius) + 1, 0, shape).astype(np.int64)
    near = (lows < highs).all(axis=1)
    for centre, low, high in zip(points[near], lows[near].tolist(), highs[near].tolist(), strict=True):
        z, y, x = (np.arange(a, b) - c for a, b, c in zip(low, high, centre, strict=True))
        squared = z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2
        yield (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])), squared


def _profile(
    squared: npt.NDArray[np.float64], radius: float, label: Label, widths: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """Return the label of one particle at the squared distances (voxels²) from its centre."""
    inside = squared <= radius * radius
    if label == "binary":
        return inside.astype(np.float32)
    first, second = (width * radius / 3 for width in widths)
    value = np.exp(squared / (-2 * first * first)) + np.exp(squared / (-2 * second * second))
    return np.where(inside, value / 2, 0.0).astype(np.float32)
