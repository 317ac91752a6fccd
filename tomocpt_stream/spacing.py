"""Spacing of points: a greedy pass in order, as exact as a sequential one and never quadratic.

The pass goes through the points in blocks. What lies near a point that stays is thrown out of each
block at once; what is left is few, because points that stay keep their distance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

Voxels = npt.NDArray[np.int64]
Distances = npt.NDArray[np.float64]

_FIRST_BLOCK, _LARGEST_BLOCK = 1 << 12, 1 << 19
_SMALLEST_HEAD, _LARGEST_HEAD = 1 << 10, 1 << 16
_PAIRS = 2_000_000  # pairs held at once: 32 MB


def space(points: Voxels, min_distance: float, p_norm: float) -> npt.NDArray[np.bool_]:
    """Return which of (n, 3) voxels, best first, keep their distance to all better ones that do.

    A point goes where its distance in the norm `p_norm` (1, 2 or infinity) to a point that stays is
    below `min_distance`. Time is near n log n, memory near n, however the points lie.
    """
    stays = np.zeros(len(points), dtype=bool)
    if min_distance <= 1:  # distinct voxels are at least 1 apart
        return ~stays
    extent = int(np.ptp(points, axis=0).sum()) + 2 if len(points) else 2
    spacing = _Spacing(min(float(min_distance), float(extent)), p_norm)
    start, size = 0, _FIRST_BLOCK
    while start < len(points):
        rows = np.arange(start, min(start + size, len(points)))
        rows = rows[~spacing.near(points[rows], points[stays])]
        while len(rows):
            head = spacing.head(points, rows)
            chosen = rows[:head][spacing.greedy(points[rows[:head]])]
            stays[chosen] = True
            rows = rows[head:]
            rows = rows[~spacing.near(points[rows], points[chosen])]
        start, size = start + size, min(2 * size, _LARGEST_BLOCK)
    return stays


class _Spacing:
    """Exact comparisons of distances by KD-trees that never hold many pairs."""

    def __init__(self, distance: float, p_norm: float) -> None:
        self._distance = distance
        self._p = p_norm
        # Trees compare squares: they are asked for a little more, and what they find is tested exactly.
        self._radius = distance * (1 + 1e-9)
        self._size = 16 * _SMALLEST_HEAD

    def near(self, points: Voxels, others: Voxels) -> npt.NDArray[np.bool_]:
        """Return which points lie below the distance from any of `others`."""
        if not len(points) or not len(others):
            return np.zeros(len(points), dtype=bool)
        tree = cKDTree(others, balanced_tree=False, compact_nodes=False)  # quicker to build
        nearest, _ = tree.query(points, p=self._p, distance_upper_bound=self._radius)
        return np.asarray(nearest < self._distance)

    def head(self, points: Voxels, rows: Voxels) -> int:
        """Return how many of the first `rows` may be taken at once; a plateau pairs all with all."""
        size = min(2 * self._size, _LARGEST_HEAD)
        while size > _SMALLEST_HEAD:
            tree = cKDTree(points[rows[:size]])
            if tree.count_neighbors(tree, self._radius, p=self._p) <= 2 * _PAIRS:
                break
            size //= 2
        self._size = size
        return min(size, len(rows))

    def greedy(self, points: Voxels) -> npt.NDArray[np.bool_]:
        """Return which points stay when each one rejects the later ones below the distance."""
        pairs = cKDTree(points).query_pairs(self._radius, p=self._p, output_type="ndarray")
        apart = np.abs(points[pairs[:, 0]] - points[pairs[:, 1]]).astype(np.float64)
        pairs = pairs[_norm(apart, self._p) < self._distance]
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        ends = np.searchsorted(pairs[:, 0], np.arange(len(points) + 1))
        stays = np.ones(len(points), dtype=bool)
        for row in np.unique(pairs[:, 0]):
            if stays[row]:
                stays[pairs[ends[row] : ends[row + 1], 1]] = False
        return stays


def _norm(apart: Distances, p_norm: float) -> Distances:
    if p_norm == 1:
        return np.asarray(apart.sum(axis=1))
    return np.asarray(apart.max(axis=1) if np.isinf(p_norm) else np.sqrt((apart**2).sum(axis=1)))
