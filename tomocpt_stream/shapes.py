"""Densities of single particles: analytic solids, procedural blobs, and density maps read from a file.

A solid is a signed distance (negative inside) in its own units. It is scaled so that its longest
axis, the greatest distance between two points of its surface, has the length that is asked for.
Density has the unit "body of a protein above ice".
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from tomocpt_stream.errors import SourceError
from tomocpt_stream.tomogram import open_tomogram

Field = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
Vector = tuple[float, float, float]
Distance = Callable[[Field], Field]

OVERSAMPLING = 2
"""Template voxels along one voxel of the phantom."""

TEXTURE = 0.3
"""Standard deviation of the density inside a solid, relative to its mean: folds and domains."""

TEXTURE_LENGTH = 12.0
"""Standard deviation (Å) of the Gaussian that correlates the texture."""

EDGE = 4.0
"""Width (Å) of the logistic edge of a solid."""

BLOB = "blob:"
MAP_SUFFIXES = (".mrc", ".map", ".rec", ".mrc.gz", ".map.gz")


def _vector(values: npt.ArrayLike) -> Field:
    return np.asarray(values, dtype=np.float32)


def _norm(p: Field) -> Field:
    # Written out: BLAS may sum in another order with another number of threads.
    length: Field = np.sqrt(p[..., 0] ** 2 + p[..., 1] ** 2 + p[..., 2] ** 2)
    return length


def _ellipsoid(p: Field, axes: Vector, at: Vector = (0.0, 0.0, 0.0)) -> Field:
    """Return the usual first-order distance to an ellipsoid, exact on its surface."""
    scaled = (p - _vector(at)) / _vector(axes)
    near = _norm(scaled)
    slope = np.maximum(_norm(scaled / _vector(axes)), np.float32(1e-6))
    distance = near * (near - np.float32(1)) / slope
    # At the very centre the quotient is 0/0; the distance there is minus the shortest half-axis.
    return np.where(near < 1e-3, np.float32(-min(axes)), distance).astype(np.float32)


def _ball(p: Field, radius: float, at: Vector = (0.0, 0.0, 0.0)) -> Field:
    return _norm(p - _vector(at)) - np.float32(radius)


def _capsule(p: Field, start: Vector, end: Vector, radius: float) -> Field:
    axis = _vector(end) - _vector(start)
    along = ((p - _vector(start)) * axis).sum(axis=-1) / (axis * axis).sum()
    foot = _vector(start) + np.clip(along, 0, 1)[..., None] * axis
    return _norm(p - foot) - np.float32(radius)


def _torus(p: Field, major: float, minor: float, height: float = 0.0) -> Field:
    ring = np.hypot(p[..., 0], p[..., 1]) - np.float32(major)
    distance: Field = np.hypot(ring, p[..., 2] - np.float32(height)) - np.float32(minor)
    return distance


def _cylinder(p: Field, radius: float, half: float, rounding: float = 0.08) -> Field:
    side = np.hypot(p[..., 0], p[..., 1]) - np.float32(radius - rounding)
    cap = np.abs(p[..., 2]) - np.float32(half - rounding)
    outside = np.hypot(np.maximum(side, 0), np.maximum(cap, 0))
    distance: Field = outside + np.minimum(np.maximum(side, cap), 0) - np.float32(rounding)
    return distance


def _brick(p: Field, half: Vector, rounding: float = 0.1) -> Field:
    q = np.abs(p) - _vector([h - rounding for h in half])
    distance: Field = _norm(np.maximum(q, 0)) + np.minimum(q.max(axis=-1), 0) - np.float32(rounding)
    return distance


def _union(*parts: Field) -> Field:
    nearest: Field = np.minimum.reduce(parts)
    return nearest


def _cut(body: Field, hole: Field) -> Field:
    rest: Field = np.maximum(body, -hole)
    return rest


def _balls(p: Field, centres: tuple[Vector, ...], radii: tuple[float, ...]) -> Field:
    return _union(*(_ball(p, radius, at) for at, radius in zip(centres, radii, strict=True)))


def _spokes(p: Field, ends: tuple[Vector, ...], radius: float) -> Field:
    return _union(*(_capsule(p, (0.0, 0.0, 0.0), end, radius) for end in ends))


_CORNERS = ((0.6, 0.6, 0.6), (0.6, -0.6, -0.6), (-0.6, 0.6, -0.6), (-0.6, -0.6, 0.6))
_POLES = (
    (0.7, 0.0, 0.0),
    (-0.7, 0.0, 0.0),
    (0.0, 0.7, 0.0),
    (0.0, -0.7, 0.0),
    (0.0, 0.0, 0.7),
    (0.0, 0.0, -0.7),
)
_TRIGON = ((0.55, 0.0, 0.0), (-0.275, 0.476, 0.0), (-0.275, -0.476, 0.0))

_TRAIN: dict[str, Distance] = {
    "globule": lambda p: _ellipsoid(p, (1.0, 0.85, 0.75)),
    "shell": lambda p: _cut(_ball(p, 1.0), _ball(p, 0.68)),
    "torus": lambda p: _torus(p, 0.66, 0.34),
    "barrel": lambda p: _cut(_cylinder(p, 0.62, 0.78), _cylinder(p, 0.26, 1.2)),
    "dumbbell": lambda p: _union(
        _balls(p, ((0.0, 0.0, 0.55), (0.0, 0.0, -0.6)), (0.45, 0.4)),
        _capsule(p, (0.0, 0.0, -0.6), (0.0, 0.0, 0.55), 0.2),
    ),
    "disc": lambda p: _cylinder(p, 1.0, 0.3, 0.15),
    "tetrahedron": lambda p: _balls(p, _CORNERS, (0.48, 0.48, 0.48, 0.48)),
    "wye": lambda p: _spokes(p, ((0.8, 0.0, 0.0), (-0.4, 0.7, 0.0), (-0.4, -0.7, 0.0)), 0.28),
    "rod": lambda p: _capsule(p, (0.0, 0.0, -0.68), (0.0, 0.0, 0.68), 0.32),
    "domains": lambda p: _balls(
        p, ((0.0, 0.0, 0.0), (0.5, 0.25, 0.1), (-0.2, 0.55, 0.3), (-0.1, -0.35, 0.6)), (0.5, 0.38, 0.3, 0.34)
    ),
}
_HELD_OUT: dict[str, Distance] = {
    "octahedron": lambda p: _balls(p, _POLES, (0.4,) * 6),
    "horseshoe": lambda p: _cut(_torus(p, 0.66, 0.34), _brick(p - _vector((0.8, 0, 0)), (0.8, 0.35, 0.6))),
    "bowl": lambda p: _cut(
        _cut(_ball(p, 1.0), _ball(p, 0.6)), _brick(p - _vector((0, 0, 1.1)), (1.2, 1.2, 0.9))
    ),
    "rings": lambda p: _union(
        *(_torus(p, 0.62, 0.22, height) for height in (-0.5, 0.5)),
        *(
            _capsule(p, (x, y, -0.5), (x, y, 0.5), 0.16)
            for x, y in ((0.62, 0.0), (-0.31, 0.54), (-0.31, -0.54))
        ),
    ),
    "mushroom": lambda p: _union(
        _ellipsoid(p, (0.85, 0.85, 0.4), (0.0, 0.0, 0.5)),
        _capsule(p, (0.0, 0.0, -0.6), (0.0, 0.0, 0.5), 0.26),
    ),
    "tripod": lambda p: _spokes(p, ((0.7, 0.0, -0.5), (-0.35, 0.6, -0.5), (-0.35, -0.6, -0.5)), 0.3),
    "trefoil": lambda p: _union(*(_ellipsoid(p, (0.48, 0.48, 0.75), at) for at in _TRIGON)),
    "subunits": lambda p: _union(
        _ellipsoid(p, (0.8, 0.7, 0.62), (0.0, 0.0, 0.25)),
        _ellipsoid(p, (0.68, 0.42, 0.34), (0.1, 0.0, -0.62)),
    ),
    "cross": lambda p: _union(
        _capsule(p, (0.0, 0.0, -0.7), (0.0, 0.0, 0.7), 0.3),
        _capsule(p, (0.0, -0.5, 0.2), (0.0, 0.5, 0.2), 0.28),
    ),
}
_DISTRACTORS: dict[str, Distance] = {
    "brick": lambda p: _brick(p, (0.5, 0.6, 0.7)),
    "pebble": lambda p: _ellipsoid(p, (1.0, 0.7, 0.5)),
    "bean": lambda p: _union(
        _capsule(p, (-0.55, 0.0, 0.0), (0.0, 0.3, 0.0), 0.4),
        _capsule(p, (0.0, 0.3, 0.0), (0.55, 0.0, 0.0), 0.4),
    ),
    "peanut": lambda p: _balls(p, ((0.0, 0.0, 0.45), (0.0, 0.0, -0.45)), (0.5, 0.5)),
    "bead": lambda p: _ball(p, 1.0),
    "filament": lambda p: _capsule(p, (0.0, 0.0, -0.87), (0.0, 0.0, 0.87), 0.13),
}
_SOLIDS = _TRAIN | _HELD_OUT | _DISTRACTORS

SHAPES_TRAIN: tuple[str, ...] = tuple(_TRAIN)
"""Named solids that a picker may be trained on; "blob:<seed>" belongs to training as well."""

SHAPES_HELD_OUT: tuple[str, ...] = tuple(_HELD_OUT)
"""Named solids kept for validation; no picker that the package ships has seen them."""

SHAPES_DISTRACTOR: tuple[str, ...] = ("brick", "pebble", "bean", "peanut")
"""Named solids used as distractors; "filament" and "bead" have roles of their own."""


def _blob(p: Field, seed: int) -> Field:
    """Return a procedural solid: a chain of ellipsoidal domains, copied round an axis or on a shell."""
    rng = np.random.default_rng([seed, 0xB10B])
    form = rng.choice(["chain", "ring", "shell"], p=[0.45, 0.35, 0.2])
    copies = int(rng.choice([2, 3, 4, 5, 6, 7])) if form == "ring" else 1
    domains = {
        "chain": int(rng.integers(2, 9)),
        "ring": int(rng.integers(1, 4)),
        "shell": int(rng.integers(0, 4)),
    }
    # Copies lie 0.3 to 0.55 units apart, less than two half-axes: nothing falls to pieces.
    offset = float(rng.uniform(0.15, 0.275) / np.sin(np.pi / copies)) if copies > 1 else 0.0
    at = np.array([offset, 0.0, 0.0])
    parts: list[tuple[Vector, Vector]] = []
    shell = rng.uniform(0.9, 1.5, size=3)
    for _ in range(domains[form]):
        step = rng.normal(size=3)
        step /= np.sqrt((step * step).sum())
        if form == "shell":
            at = step * shell
        parts.append((_triple(at), _triple(rng.uniform(0.32, 0.6, size=3))))
        at = at + step * rng.uniform(0.3, 0.55)
        at *= min(1.0, 1.8 / float(np.sqrt((at * at).sum())))
    q = p * np.float32(2.0)  # chains and shells reach 1.8 + 0.6 units; the survey grid ends at 1.25
    bodies = [
        _ellipsoid(_turned(q, 2 * np.pi * copy / copies), axes, centre)
        for copy in range(copies)
        for centre, axes in parts
    ]
    if form == "shell":
        inner = shell - rng.uniform(0.3, 0.6)
        bodies.append(_cut(_ellipsoid(q, _triple(shell)), _ellipsoid(q, _triple(inner))))
    return _union(*bodies) / np.float32(2.0)


def _triple(values: Array) -> Vector:
    return (float(values[0]), float(values[1]), float(values[2]))


def _turned(p: Field, angle: float) -> Field:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y, z = p[..., 0], p[..., 1], p[..., 2]
    return np.stack([cos * x + sin * y, cos * y - sin * x, z], axis=-1)


def solid(kind: str) -> Distance:
    """Return the signed distance of a named solid or of "blob:<seed>"; points are (..., 3).

    Raises
    ------
    SourceError
        When no solid has this name.
    """
    if kind.startswith(BLOB) and kind[len(BLOB) :].isdigit():
        return partial(_blob, seed=int(kind[len(BLOB) :]))
    if kind not in _SOLIDS:
        raise SourceError(
            f"particle kind {kind!r}",
            expected=f"{', '.join(_SOLIDS)}, blob:<seed>, or the path of a map ({', '.join(MAP_SUFFIXES)})",
            remedy="correct the name, or give the path of a density map",
        )
    return _SOLIDS[kind]


@dataclass(frozen=True, eq=False)
class Template:
    """A particle's density, (z, y, x) float32 at `pitch` Å per template voxel.

    `centre` is the centre of mass (zyx, template voxels), `radius` the distance (Å) from it to the
    farthest point of the particle, `diameter` its longest axis (Å).
    """

    kind: str
    density: Field
    pitch: float
    centre: tuple[float, float, float]
    radius: float
    diameter: float


def is_map(kind: str) -> bool:
    """Return whether a particle kind names a density-map file."""
    return kind.lower().endswith(MAP_SUFFIXES)


def solid_template(kind: str, diameter: float, voxel_size: float) -> Template:
    """Return the template of a solid whose longest axis is `diameter` Å, for a phantom of `voxel_size` Å."""
    distance = solid(kind)
    extent, low, high = _survey(kind)
    scale = diameter / extent  # Å per unit
    pitch = voxel_size / OVERSAMPLING
    # Room for the soft edge and for the blur that follows.
    room = 2 * voxel_size + 2 * EDGE
    axes = [
        _vector(np.arange(math.floor((a * scale - room) / pitch), math.ceil((b * scale + room) / pitch) + 1))
        * np.float32(pitch / scale)
        for a, b in zip(low, high, strict=True)
    ]
    zz, yy, xx = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    points = np.stack([xx, yy, zz], axis=-1)
    edge = np.clip(distance(points) * np.float32(scale / EDGE), -30, 30)
    density = _texture(kind, edge.shape, pitch) / (1 + np.exp(edge))
    return _finish(kind, density.astype(np.float32), pitch, diameter)


def map_template(path: str, diameter: float | None, voxel_size: float) -> Template:
    """Return the template of a density-map file, for a phantom of `voxel_size` Å.

    The map keeps its size in Å; with `diameter` (Å) its longest axis is scaled to it. The density
    is divided by its body (mean of the voxels above half the 99.9th percentile of the positive
    ones); what is below 5 % of the body (solvent noise, ripples) becomes zero.

    Raises
    ------
    SourceError
        When the file cannot be read, or holds no density.
    """
    tomogram = open_tomogram(Path(path))
    nz, ny, nx = tomogram.shape
    density = tomogram.read((slice(0, nz), slice(0, ny), slice(0, nx)))
    positive = density[density > 0]
    if not positive.size:
        raise SourceError(
            f"{path}: no voxel above zero",
            expected="density of a particle above zero",
            remedy="negate the map",
        )
    body = positive[positive > 0.5 * np.percentile(positive, 99.9)].mean(dtype=np.float64)
    density = density / np.float32(body)
    density[density < 0.05] = 0
    longest = _longest(np.argwhere(density > 0.3).astype(np.float64)) * tomogram.voxel_size
    stretch = 1.0 if diameter is None else diameter / longest
    source, pitch = tomogram.voxel_size * stretch, voxel_size / OVERSAMPLING
    if pitch > source:  # coarser template: what it cannot hold must go first
        density = ndimage.gaussian_filter(density, 0.5 * pitch / source)
    room = np.array(density.shape) * source + 4 * voxel_size
    shape = tuple(int(n) for n in np.ceil(room / pitch))
    ratio = pitch / source
    offset = (np.array(density.shape) - 1) / 2 - ratio * (np.array(shape) - 1) / 2
    sampled = ndimage.affine_transform(density, np.full(3, ratio), offset, output_shape=shape, order=3)
    sampled = np.maximum(sampled, 0)
    return _finish(Path(path).name.split(".")[0], sampled, pitch, longest * stretch)


@lru_cache(maxsize=1024)
def _survey(kind: str) -> tuple[float, Vector, Vector]:
    """Return a solid's longest axis and the two corners (xyz) of its box, in its own units.

    About every point inside lies a ball, as large as its distance from the surface, that is inside
    too: the farthest ball in a direction tells where the surface is to much less than the step.
    """
    axis = np.linspace(-1.25, 1.25, 61, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    depth = -solid(kind)(points)
    skin = (depth >= 0) & (depth < 1.5 * (axis[1] - axis[0]))
    balls, radii = points[skin].astype(np.float64), depth[skin].astype(np.float64)
    widths = [_width(balls, radii, way) for way in _directions(150)]
    longest, way = max(widths, key=lambda width: width[0])
    for _ in range(4):  # the line between the two ends found is a better direction yet
        refined, way = _width(balls, radii, way)
        longest = max(longest, refined)
    low = (balls - radii[:, None]).min(axis=0)
    high = (balls + radii[:, None]).max(axis=0)
    return longest, _triple(low), _triple(high)


def _width(balls: Array, radii: Array, way: Array) -> tuple[float, Array]:
    """Return how wide a union of balls is along a unit vector, and the direction from end to end."""
    height = (balls * way).sum(axis=1)
    top, bottom = (height + radii).argmax(), (radii - height).argmax()
    wide = float(height[top] + radii[top] + radii[bottom] - height[bottom])
    line = balls[top] - balls[bottom] + (radii[top] + radii[bottom]) * way
    return wide, line / np.sqrt((line * line).sum())


def _directions(count: int) -> Array:
    """Return (count, 3) unit vectors spread evenly over half a sphere (a Fibonacci spiral)."""
    index = np.arange(count) + 0.5
    z = index / count
    turn = np.pi * (1 + math.sqrt(5)) * index
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), z], axis=1)


def _longest(points: Array) -> float:
    corners = points[ConvexHull(points).vertices]
    return float(pdist(corners).max())


def _texture(kind: str, shape: tuple[int, ...], pitch: float) -> Field:
    rng = np.random.default_rng([zlib.crc32(kind.encode()), 0x7E47])
    rough = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), TEXTURE_LENGTH / pitch)
    rough /= np.float32(rough.std(dtype=np.float64))
    texture: Field = np.maximum(1 + np.float32(TEXTURE) * rough, np.float32(0.1)).astype(np.float32)
    return texture


def _finish(kind: str, density: Field, pitch: float, diameter: float) -> Template:
    """Band-limit a template for sampling at OVERSAMPLING times its pitch and measure it."""
    smooth: Field = ndimage.gaussian_filter(density, 0.5 * OVERSAMPLING).astype(np.float32)
    weights = smooth.astype(np.float64)
    mass = weights.sum()
    centre = [
        float((weights.sum(axis=tuple(k for k in range(3) if k != axis)) @ np.arange(n)) / mass)
        for axis, n in enumerate(weights.shape)
    ]
    body = np.argwhere(smooth > 0.3 * min(1.0, float(smooth.max())))
    radius = float(np.linalg.norm(body - np.array(centre), axis=1).max()) * pitch
    return Template(kind, smooth, pitch, _triple(np.array(centre)), radius, diameter)
