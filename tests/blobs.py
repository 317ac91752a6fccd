"""Dark blobs in noise, and a matched filter that stands in for a trained picker."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tomocpt_stream.blocks import Window

Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

RADIUS = 4.0


def blobs(
    shape: tuple[int, int, int], centres: npt.ArrayLike, *, width: float = 2.0, seed: int = 0
) -> Floats:
    """Return noise of deviation 0.05 with a dark Gaussian of depth 1 at each centre (zyx voxels)."""
    volume = np.random.default_rng(seed).normal(0.0, 0.05, size=shape)
    grid = np.indices(shape, dtype=np.float64)
    for centre in np.atleast_2d(np.asarray(centres, dtype=np.float64)):
        away = sum((axis - place) ** 2 for axis, place in zip(grid, centre, strict=True))
        volume -= np.exp(-away / (2 * width**2))
    return volume.astype(np.float32)


@dataclass
class BlobPicker:
    """Scores how dark a place is: 1 for the darkest value that normalised voxels have, 0 for the median."""

    window: Window = field(default_factory=lambda: Window((24, 24, 24), (6, 6, 6)))
    particle_radius: float = RADIUS
    batches: int = 0

    def score(self, batch: Floats) -> Floats:
        """Return the scores of a batch (n, z, y, x)."""
        self.batches += 1
        smooth = [ndimage.gaussian_filter(window, 1.0, radius=4) for window in batch]
        return np.clip(np.stack(smooth) / np.float32(-3.0), 0.0, 1.0).astype(np.float32)


@dataclass
class NamedBlobPicker(BlobPicker):
    """The same with a fingerprint, so that its maps can be taken up again."""

    fingerprint: str = "blobs of radius 4"


def nearest(found: Points, wanted: npt.ArrayLike) -> Points:
    """Return the distance (voxels) from each wanted point to the nearest found one."""
    gaps = np.asarray(wanted, dtype=np.float64)[:, None, :] - found[None, :, :]
    distances: Points = np.sqrt((gaps**2).sum(axis=2)).min(axis=1)
    return distances
