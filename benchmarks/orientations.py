"""Rotations to try in template matching, and a map's point group, by which many of them are the same.

A rotation is a matrix that turns a vector (x, y, z) of the particle into one of the tomogram.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize
from scipy.spatial.transform import Rotation

Array = npt.NDArray[np.float64]

AGREEMENT = 0.97
"""Least correlation of a map with itself turned, radial average taken off, that counts as symmetry."""

_FOLDS = (2, 3, 4, 5, 6, 7)
_AXES = 400  # directions of half a sphere that are tried: 7° apart
_SAME = 8.0  # degrees within which two elements of a group are one
_MOST = 60  # rotations of the icosahedral group


def rotation_list(step: float) -> Array:
    """Return (n, 3, 3) rotations about `step` degrees apart that cover all orientations evenly."""
    angle = math.radians(step)
    around = max(1, round(2 * math.pi / angle))
    directions = _sphere(max(2, round(4 * math.pi / angle**2)))
    polar, azimuth = np.arccos(directions[:, 2]), np.arctan2(directions[:, 1], directions[:, 0])
    # A direction's in-plane turns begin elsewhere than its neighbour's, which closes the gaps.
    golden = np.arange(len(directions)) * (math.sqrt(5) - 1) / 2 % 1
    turns = (np.arange(around)[None] + golden[:, None]) * (2 * math.pi / around)
    angles = np.stack(
        [np.repeat(azimuth, around), np.repeat(polar, around), (turns - azimuth[:, None]).ravel()], axis=1
    )
    matrices: Array = Rotation.from_euler("ZYZ", angles).as_matrix()
    return matrices


def one_of_each(rotations: Array, group: Array) -> Array:
    """Return the rotations that remain where those that differ by an element of `group` look the same.

    Of each such set the rotation by the smallest angle is kept.
    """
    own = np.trace(rotations, axis1=1, axis2=2)  # greater for a smaller angle
    best = np.max([np.einsum("nij,ji->n", rotations, element) for element in group], axis=0)
    kept: Array = rotations[own >= best - 1e-9]
    return kept


def rotation_error(found: Array, true: Array, group: Array) -> Array:
    """Return (n,) degrees between rotations (n, 3, 3), whichever of the equal ones is nearest."""
    traces = [np.einsum("nij,jk,nik->n", found, element, true) for element in group]
    cosine = (np.max(traces, axis=0) - 1) / 2
    degrees: Array = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return degrees


def point_group(density: npt.NDArray[np.float32], centre: tuple[float, float, float]) -> Array:
    """Return (g, 3, 3) rotations about `centre` (zyx) that leave a density (z, y, x) the same.

    Found from the map alone: axes are searched and refined, and one is taken, best first, where the map
    bears out all products with those before.
    """
    body = _Body.of(density, np.array(centre))
    generators: list[Array] = []
    group = np.eye(3)[None]
    for axis, fold in _axes(body):
        element = _turn(axis, fold)
        if not _is_new(element, group):
            continue
        larger = _closed([*generators, element])
        if len(larger) <= _MOST and all(body.agreement(one) >= AGREEMENT for one in larger):
            generators, group = [*generators, element], larger
    return group


@dataclass(frozen=True, eq=False)
class _Body:
    """Voxels of a particle about its centre (x, y, z), and what its density has beside the radial mean."""

    points: Array
    values: Array
    field: Array
    middle: Array

    @classmethod
    def of(cls, density: npt.NDArray[np.float32], centre: Array) -> _Body:
        grid = np.indices(density.shape).reshape(3, -1).T - centre
        radius = np.linalg.norm(grid, axis=1)
        flat = density.ravel().astype(np.float64)
        shell, share = np.floor(radius).astype(np.intp), radius % 1
        # Shared between two shells and read between them: steps would be a pattern of their own.
        size = int(shell.max()) + 2
        weight = np.bincount(shell, 1 - share, size) + np.bincount(shell + 1, share, size)
        mean = np.bincount(shell, flat * (1 - share), size) + np.bincount(shell + 1, flat * share, size)
        mean = mean / np.maximum(weight, 1e-9)
        field = (flat - mean[shell] * (1 - share) - mean[shell + 1] * share).reshape(density.shape)
        inside = radius <= radius[flat > 0.3 * min(1.0, float(flat.max()))].max()
        thin = max(1, int(inside.sum()) // 3000)  # enough to tell symmetry by
        chosen = np.flatnonzero(inside)[::thin]
        return cls(grid[chosen][:, ::-1], field.ravel()[chosen], field, centre)

    def agreement(self, element: Array) -> float:
        """Return the correlation of the density with itself turned by `element`."""
        places = (self.points @ element.T)[:, ::-1] + self.middle
        there = ndimage.map_coordinates(self.field, places.T, order=1)
        scale = math.sqrt(float((there**2).sum() * (self.values**2).sum()))
        return float((there * self.values).sum()) / scale if scale else 0.0


def _axes(body: _Body) -> list[tuple[Array, int]]:
    """Return the symmetry axes and their folds, best agreement first."""
    directions = _sphere(2 * _AXES)
    directions = directions[directions[:, 2] >= 0]
    near = np.abs(directions @ directions.T) > math.cos(math.radians(10))
    found = []
    for fold in _FOLDS:
        scores = np.array([body.agreement(_turn(axis, fold)) for axis in directions])
        peaks = np.flatnonzero((scores >= np.where(near, scores[None], -1).max(axis=1)) & (scores > 0.3))
        for index in peaks[np.argsort(-scores[peaks])][:6]:
            axis, score = _refined(body, directions[index], fold)
            if score >= AGREEMENT:
                found.append((score, axis, fold))
    found.sort(key=lambda one: -one[0])
    return [(axis, fold) for _, axis, fold in found]


def _refined(body: _Body, axis: Array, fold: int) -> tuple[Array, float]:
    beside = np.linalg.svd(axis[None])[2][1:]

    def moved(by: Array) -> Array:
        there = axis + by @ beside
        unit: Array = there / np.linalg.norm(there)
        return unit

    best = optimize.minimize(
        lambda by: -body.agreement(_turn(moved(by), fold)),
        np.zeros(2),
        method="Nelder-Mead",
        options={"initial_simplex": [[0, 0], [0.05, 0], [0, 0.05]], "xatol": 1e-3, "fatol": 1e-5},
    )
    return moved(best.x), -float(best.fun)


def _turn(axis: Array, fold: int) -> Array:
    matrix: Array = Rotation.from_rotvec(axis * (2 * math.pi / fold)).as_matrix()
    return matrix


def _closed(generators: list[Array]) -> Array:
    """Return all products of the generators; more than _MOST where they make no group."""
    group = np.eye(3)[None]
    fresh = [np.eye(3)]
    while fresh and len(group) <= _MOST:
        products = [generator @ element for element in fresh for generator in generators]
        fresh = []
        for product in products:
            if _is_new(product, group):
                group = np.concatenate([group, product[None]])
                fresh.append(product)
    return group


def _is_new(element: Array, group: Array) -> bool:
    traces = np.einsum("nij,ij->n", group, element)
    return bool((traces < 1 + 2 * math.cos(math.radians(_SAME))).all())


def _sphere(count: int) -> Array:
    """Return (count, 3) unit vectors spread evenly over the sphere (a Fibonacci spiral)."""
    index = np.arange(count) + 0.5
    z = 1 - 2 * index / count
    turn = math.pi * (1 + math.sqrt(5)) * index
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), z], axis=1)
