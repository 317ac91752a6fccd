"""The specimen of a phantom: particles, distractors, gold, membranes, ice, placed without overlap.

The specimen is larger than the field of view: tilted views look past the field's borders along x,
so those surroundings are populated as densely as the field itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import SourceError
from tomocpt_stream.shapes import (
    BLOB,
    SHAPES_DISTRACTOR,
    SHAPES_TRAIN,
    Field,
    Template,
    is_map,
    map_template,
    solid,
    solid_template,
)

if TYPE_CHECKING:
    from tomocpt_stream.frame import Shape

Role = Literal["target", "distractor", "gold", "membrane", "ice"]
Array = npt.NDArray[np.float64]

GOLD_DENSITY = 6.0
"""Gold above ice, relative to protein: mean inner potentials near 25, 7.5 and 4.9 V give 8; a bead
turns the phase by more than a radian, so that the image grows less than in proportion."""

LEAFLET_DENSITY = 0.8
LEAFLET_WIDTH = 7.0
"""Peak density and standard deviation (Å) of either leaflet of a membrane."""

ICE_DENSITY = 2.0
SOLID = 0.3
"""Density above which a voxel belongs to an object when overlaps are looked for."""

TRIES = 2000


def refuse(found: str, expected: str, remedy: str) -> SourceError:
    """Return the error of an option that cannot be used."""
    return SourceError(found, expected=expected, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class SpecimenOptions:
    """What lies in the ice.

    shape : voxels (z, y, x) of the tomogram; beam along z, tilt axis along y.
    voxel_size : Å.
    diameter : longest axis (Å) of every target that is not a density map.
    particles : kinds of target, each a named solid (`SHAPES_TRAIN`, `SHAPES_HELD_OUT`), a
        procedural one "blob:<seed>", or the path of a density map.
    count : targets in the field of view, shared evenly among the kinds.
    scale_maps : scale the longest axis of density maps to `diameter`; otherwise they keep their Å.
    distractors : number of distractors in the field.
    distractor_kinds : their kinds in turn; density maps keep their size.
    distractor_sizes : least and greatest longest axis of a distractor, in diameters.
    large : objects in the field that are larger than a target, role "distractor"; kinds as above.
    large_sizes : least and greatest longest axis of one of them, in diameters.
    filaments : long rods in the field, 1.8 to 2.6 diameters long, role "distractor".
    gold, gold_diameter : beads in the field, and their diameter in Å.
    vesicles, sheets : closed membranes in the field, and membranes that run through all of it.
    membrane_thickness : Å between the outer faces of both leaflets.
    ice : lumps of crystalline ice at the faces of the slab.
    separation : least distance of two compact objects in sums of their radii (about the centre of
        mass); 1 keeps their spheres apart, less crowds them. Densities never overlap.
    margin : Å between a target's centre and the faces; None keeps every target whole.
    """

    shape: Shape = (96, 256, 256)
    voxel_size: float = 10.0
    diameter: float = 200.0
    particles: tuple[str, ...] = SHAPES_TRAIN
    count: int = 60
    scale_maps: bool = False
    distractors: int = 20
    distractor_kinds: tuple[str, ...] = SHAPES_DISTRACTOR
    distractor_sizes: tuple[float, float] = (0.35, 0.6)
    large: int = 0
    large_sizes: tuple[float, float] = (1.6, 2.6)
    filaments: int = 2
    gold: int = 3
    gold_diameter: float = 100.0
    vesicles: int = 1
    sheets: int = 0
    membrane_thickness: float = 40.0
    ice: int = 0
    separation: float = 0.9
    margin: float | None = None

    def __post_init__(self) -> None:
        if np.shape(self.shape) != (3,) or min(self.shape) < 8:
            raise refuse(f"shape {self.shape}", "three edges of 8 voxels or more (z, y, x)", "enlarge it")
        for name in ("voxel_size", "diameter", "gold_diameter", "membrane_thickness", "separation"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise refuse(f"{name} {getattr(self, name)}", "a positive number", f"pass {name} above zero")
        for name in ("count", "distractors", "large", "filaments", "gold", "vesicles", "sheets", "ice"):
            if getattr(self, name) < 0:
                raise refuse(f"{name} {getattr(self, name)}", "0 or more", f"pass {name} of 0 or more")
        self._check_kinds()
        if self.diameter < 4 * self.voxel_size:
            raise refuse(
                f"diameter {self.diameter:g} Å at {self.voxel_size:g} Å a voxel",
                "4 voxels or more along the longest axis",
                "use a smaller voxel_size",
            )

    def _check_kinds(self) -> None:
        for name in ("distractor_sizes", "large_sizes"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise refuse(f"{name} {(low, high)}", "0 < least <= greatest", "order them")
        others = self.distractors or self.large
        if (self.count and not self.particles) or (others and not self.distractor_kinds):
            raise refuse("objects without a kind", "a kind for every count above zero", "name one")
        for kind in (*self.particles, *self.distractor_kinds):
            if not is_map(kind):
                solid(kind)


@dataclass(frozen=True, eq=False)
class Placed:
    """An object of the specimen that lies in the field of view.

    `zyx` is its centre of mass in voxels of the tomogram (0 = centre of the first voxel),
    `rotation` turns a vector (x, y, z) of the particle into one of the tomogram, `diameter` is its
    longest axis in Å.
    """

    kind: str
    role: Role
    zyx: tuple[float, float, float]
    rotation: Array
    diameter: float


@dataclass(eq=False)
class Canvas:
    """The slab of ice while it is filled: density (z, x, y), pads beyond the field (zyx), the objects.

    y comes last, since every row along y is projected in the same way.
    """

    density: Field
    pad: Shape
    shape: Shape
    objects: list[Placed] = field(default_factory=list)
    centres: list[Array] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)

    @property
    def slab(self) -> Shape:
        """The canvas's edges, zyx."""
        nz, nx, ny = self.density.shape
        return (nz, ny, nx)

    def is_free(self, centre: Array, radius: float, separation: float) -> bool:
        """Return whether a sphere (voxels) keeps its distance from all compact objects."""
        if not self.centres:
            return True
        gap = np.linalg.norm(np.array(self.centres) - centre, axis=1)
        return bool((gap >= separation * (np.array(self.radii) + radius)).all())

    def paint(self, stamp: Field, corner: npt.NDArray[np.intp], *, overlap: bool = False) -> bool:
        """Add a stamp (zyx) with its first voxel at `corner`, unless it meets what is there already."""
        low = np.maximum(corner, 0)
        high = np.minimum(corner + stamp.shape, self.slab)
        if (high <= low).any():
            return False
        inner = tuple(slice(int(a), int(b)) for a, b in zip(low - corner, high - corner, strict=True))
        part = stamp[inner].transpose(0, 2, 1)
        there = self.density[low[0] : high[0], low[2] : high[2], low[1] : high[1]]
        if not overlap and ((there > SOLID / 2) & (part > SOLID)).any():
            return False
        there += part
        return True


def build_specimen(options: SpecimenOptions, pad: Shape, rng: np.random.Generator) -> Canvas:
    """Return the filled slab: the field of view with `pad` voxels (zyx) more on either side.

    Raises SourceError when the field cannot hold that many objects.
    """
    nz, ny, nx = (n + 2 * p for n, p in zip(options.shape, pad, strict=True))
    canvas = Canvas(np.zeros((nz, nx, ny), dtype=np.float32), pad, options.shape)
    for kind in ("vesicle",) * options.vesicles + ("sheet",) * options.sheets:
        _place_membrane(canvas, options, rng, kind)
    lumps = [f"{BLOB}{rng.integers(1 << 30)}" for _ in range(options.ice)]
    lengths = options.diameter * rng.uniform(1.8, 2.6, size=options.filaments)
    sizes = options.diameter * rng.uniform(*options.distractor_sizes, size=options.distractors)
    bulks = options.diameter * rng.uniform(*options.large_sizes, size=options.large)
    others = options.distractor_kinds
    for batch in (
        _Batch("ice", [_template(kind, 2 * options.diameter, options) for kind in lumps], ICE_DENSITY),
        _Batch("distractor", [_template("filament", float(a), options) for a in lengths], compact=False),
        _Batch(
            "distractor", [_template(others[i % len(others)], float(a), options) for i, a in enumerate(bulks)]
        ),
        _Batch("target", _cycled([_target(kind, options) for kind in options.particles], options.count)),
        _Batch("gold", [_template("bead", options.gold_diameter, options)] * options.gold, GOLD_DENSITY),
        _Batch(
            "distractor", [_template(others[i % len(others)], float(a), options) for i, a in enumerate(sizes)]
        ),
    ):
        _fill_field(canvas, options, rng, batch)
        _fill_surroundings(canvas, options, rng, batch)
    return canvas


@dataclass(frozen=True, eq=False)
class _Batch:
    """Objects placed together, a template for each of those in the field.

    `compact` says that an object's sphere keeps others away; a filament's would empty the field.
    """

    role: Role
    templates: list[Template]
    weight: float = 1.0
    compact: bool = True


def _cycled(templates: list[Template], count: int) -> list[Template]:
    return [templates[index % len(templates)] for index in range(count)]


def _template(kind: str, diameter: float, options: SpecimenOptions) -> Template:
    if is_map(kind):
        return map_template(kind, None, options.voxel_size)
    return solid_template(kind, diameter, options.voxel_size)


def _target(kind: str, options: SpecimenOptions) -> Template:
    if is_map(kind):
        return map_template(kind, options.diameter if options.scale_maps else None, options.voxel_size)
    return solid_template(kind, options.diameter, options.voxel_size)


def _fill_field(canvas: Canvas, options: SpecimenOptions, rng: np.random.Generator, batch: _Batch) -> None:
    size = np.array(canvas.shape, dtype=np.float64)
    for index, template in enumerate(batch.templates):
        low = _keep_off(template, options, batch)
        span = size - 1 - 2 * low
        if (span < 0).any() or not any(
            _try(canvas, options, rng, (batch, template, low + span * rng.random(3))) for _ in range(TRIES)
        ):
            raise refuse(
                f"no room for {batch.role} {index + 1} of {len(batch.templates)} ({template.kind}, "
                f"{template.diameter:.0f} Å) in {canvas.shape} voxels of {options.voxel_size:g} Å",
                "objects that fit without overlap",
                "ask for fewer or smaller objects, a lower separation or margin, or a larger shape",
            )


def _fill_surroundings(
    canvas: Canvas, options: SpecimenOptions, rng: np.random.Generator, batch: _Batch
) -> None:
    """Populate what lies beside the field as densely as the field, as far as there is room."""
    _, ny, nx = canvas.shape
    _, sy, sx = canvas.slab
    wanted = round(len(batch.templates) * (sy * sx / (ny * nx) - 1))
    pad, field_size, slab = (
        np.array(canvas.pad, dtype=np.float64),
        np.array(canvas.shape, dtype=np.float64),
        np.array(canvas.slab, dtype=np.float64),
    )
    for template in _cycled(batch.templates, wanted):
        low = np.maximum(_keep_off(template, options, batch), 0.0)
        radius = template.radius / options.voxel_size
        for _ in range(20):
            at = slab * rng.random(3) - pad
            at[0] = low[0] + (field_size[0] - 1 - 2 * low[0]) * rng.random()
            beside = (at[1:] < -radius) | (at[1:] > field_size[1:] - 1 + radius)
            if beside.any() and _try(canvas, options, rng, (batch, template, at)):
                break


def _keep_off(template: Template, options: SpecimenOptions, batch: _Batch) -> Array:
    """Return how far (voxels, zyx) the centre stays from the faces of the field."""
    if batch.role == "ice":
        return np.zeros(3)
    if not batch.compact:
        return np.full(3, template.diameter / options.voxel_size / 6)
    margin = template.radius if options.margin is None or batch.role != "target" else options.margin
    return np.full(3, margin / options.voxel_size)


def _try(
    canvas: Canvas, options: SpecimenOptions, rng: np.random.Generator, what: tuple[_Batch, Template, Array]
) -> bool:
    """Put one object with its centre of mass at a point of the field (voxels, zyx) if there is room."""
    batch, template, at = what
    if batch.role == "ice":  # it grows on the faces of the slab
        at = at.copy()
        at[0] = 0.0 if at[0] < canvas.shape[0] / 2 else canvas.shape[0] - 1.0
    centre = at + np.array(canvas.pad, dtype=np.float64)
    compact = batch.compact and batch.role != "ice"
    radius = template.radius / options.voxel_size
    if compact and not canvas.is_free(centre, radius, options.separation):
        return False
    rotation = _random_rotation(rng)
    stamp, corner = stamp_of(template, centre, rotation, options.voxel_size)
    if not canvas.paint(stamp * np.float32(batch.weight), corner, overlap=batch.role == "ice"):
        return False
    if compact:
        canvas.centres.append(centre)
        canvas.radii.append(radius)
    if ((at >= -0.5) & (at <= np.array(canvas.shape, dtype=np.float64) - 0.5)).all():
        where = (float(at[0]), float(at[1]), float(at[2]))
        canvas.objects.append(Placed(template.kind, batch.role, where, rotation, template.diameter))
    return True


def _random_rotation(rng: np.random.Generator) -> Array:
    """Return a rotation drawn uniformly: a normal quaternion has no preferred direction."""
    matrix: Array = Rotation.from_quat(rng.normal(size=4)).as_matrix()
    return matrix


def stamp_of(
    template: Template, centre: Array, rotation: Array, voxel_size: float
) -> tuple[Field, npt.NDArray[np.intp]]:
    """Return a template turned by `rotation` (x, y, z) and sampled about `centre` (voxels, zyx).

    The second value is the voxel (zyx) of the stamp's first corner.
    """
    reach = math.ceil(template.radius / voxel_size) + 3
    corner = np.floor(centre).astype(np.intp) - reach
    edge = 2 * reach + 2
    # Output voxel o lies at template index centre_t + R^T (o + corner - centre) * voxel / pitch.
    matrix = rotation[::-1, ::-1].T * (voxel_size / template.pitch)
    offset = np.array(template.centre, dtype=np.float64) + matrix @ (corner - centre)
    stamp: Field = ndimage.affine_transform(
        template.density, matrix, offset, output_shape=(edge,) * 3, order=1
    )
    return stamp, corner


def _place_membrane(canvas: Canvas, options: SpecimenOptions, rng: np.random.Generator, kind: str) -> None:
    """Add an ellipsoidal shell: a vesicle inside the field, or a sheet, which is part of a large one."""
    size, voxel = np.array(canvas.shape, dtype=np.float64), options.voxel_size
    at = size * rng.uniform(0.3, 0.7, size=3)
    if kind == "vesicle":
        axes = size.min() * rng.uniform(0.2, 0.35) * rng.uniform(0.8, 1.2, size=3)
        middle = at
    else:
        axes = size.max() * rng.uniform(0.8, 1.6) * rng.uniform(0.8, 1.2, size=3)
        angle = rng.uniform(0, 2 * math.pi)
        direction = np.array([rng.uniform(-0.2, 0.2), math.sin(angle), math.cos(angle)])
        middle = at + direction / np.linalg.norm(direction / axes)  # the shell runs through `at`
    _paint_shell(canvas, (middle + np.array(canvas.pad, dtype=np.float64)) * voxel, axes * voxel, options)
    where = (float(at[0]), float(at[1]), float(at[2]))
    canvas.objects.append(Placed(kind, "membrane", where, np.eye(3), float(2 * axes.max() * voxel)))


def _paint_shell(canvas: Canvas, middle: Array, axes: Array, options: SpecimenOptions) -> None:
    """Paint both leaflets of an ellipsoidal shell, plane by plane; `middle` and `axes` are in Å, zyx."""
    nz, nx, ny = canvas.density.shape
    voxel = options.voxel_size
    x = ((np.arange(nx) * voxel - middle[2]) / axes[2]).astype(np.float32)[:, None]
    y = ((np.arange(ny) * voxel - middle[1]) / axes[1]).astype(np.float32)[None, :]
    width = np.float32(math.hypot(LEAFLET_WIDTH, 0.5 * voxel))  # as the templates: band-limited
    peak = np.float32(LEAFLET_DENSITY * LEAFLET_WIDTH) / width
    for plane in range(nz):
        z = np.float32((plane * voxel - middle[0]) / axes[0])
        near = np.sqrt(x * x + y * y + z * z)
        slope = np.sqrt(
            (x / np.float32(axes[2])) ** 2 + (y / np.float32(axes[1])) ** 2 + (z / np.float32(axes[0])) ** 2
        )
        distance = np.abs(near * (near - 1) / np.maximum(slope, np.float32(1e-9)))
        offset = distance - np.float32(options.membrane_thickness / 2 - LEAFLET_WIDTH)
        shell = peak * np.exp(-0.5 * (offset / width) ** 2)
        np.maximum(canvas.density[plane], shell, out=canvas.density[plane])
