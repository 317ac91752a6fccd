"""Working volumes in memory, as crops are read from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tomocpt_stream.crops import Example
from tomocpt_stream.targets import paint_box


@dataclass(frozen=True, eq=False)
class MemoryVolume:
    """An array (z, y, x) with percentiles, that a crop takes for a working volume."""

    array: npt.NDArray[np.float32]
    percentiles: tuple[float, float, float] = (-2.0, 0.5, 2.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.array.shape
        return (z, y, x)


def two_balls(seed: int = 0) -> Example:
    """Two dark balls of radius 6 in weak noise, 40 x 48 x 80 voxels."""
    rng = np.random.default_rng(seed)
    shape = (40, 48, 80)
    centres = np.array([[12.0, 12.0, 14.0], [26.0, 33.0, 30.0]]) + rng.uniform(-2, 2, (2, 3))
    box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    balls = paint_box(centres, box, radius=6.0, label="binary")
    voxels = 0.3 * rng.standard_normal(shape, dtype=np.float32) - 2 * balls
    return Example(MemoryVolume(voxels, (-1.0, 0.0, 1.0)), centres)
