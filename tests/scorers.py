"""Stand-ins for a picker whose right answer is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tomocpt_stream.blocks import Window

Batch = npt.NDArray[np.float32]
SMALL = Window((16, 16, 16), (3, 3, 3))


class Identity:
    """Its score is what it sees."""

    def __init__(self, window: Window = SMALL, radius: float = 3.0) -> None:
        self.window = window
        self.particle_radius = radius
        self.fingerprint = f"identity {window}"
        self.batches = 0

    def score(self, batch: Batch) -> Batch:
        assert batch.flags.c_contiguous
        assert batch.dtype == np.float32
        self.batches += 1
        return batch


class PlaceDependent(Identity):
    """Its score depends on where in the window a voxel lies and on all that the window sees."""

    def score(self, batch: Batch) -> Batch:
        self.batches += 1
        z, y, x = (np.arange(n, dtype=np.float32) for n in self.window.shape)
        place = np.sin(z[:, None, None] + 2 * y[None, :, None]) + np.cos(3 * x)[None, None, :]
        mean = batch.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
        scores: Batch = (batch * place + mean).astype(np.float32)
        return scores


class MatchedFilter(Identity):
    """It answers a blob that is darker than its surroundings, with scores about 0 to 1."""

    def score(self, batch: Batch) -> Batch:
        self.batches += 1
        sigma = self.particle_radius / 2
        smooth = np.stack([-ndimage.gaussian_filter(window, sigma, mode="nearest") for window in batch])
        scores: Batch = smooth.astype(np.float32)
        return scores
