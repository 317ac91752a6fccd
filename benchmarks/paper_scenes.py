"""The tomograms of the paper's experiments: simulated fields of one particle, carboxysomes, test files.

Each is made once, from a specification that says all of it, and kept with its truth.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from tomocpt_stream import Picks, Tomogram, open_tomogram
from tomocpt_stream.imaging import ImagingOptions, back_project, expose, plan_geometry, project
from tomocpt_stream.phantom import Phantom, PhantomOptions, simulate_phantom, write_mrc
from tomocpt_stream.shapes import Template, map_template
from tomocpt_stream.specimen import Canvas, Placed, stamp_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Array = npt.NDArray[np.float64]

SHELL = 40.0
"""Å, the wall of a carboxysome."""

OTHERS = ("maps_5A/2cg9", "maps_5A/3cf3", "maps_5A/1u6g", "maps_5A/3j9i")
"""Maps of the proteins outside the shell."""

_SEPARATION = 0.75  # diameters between rubiscos, as far as their densities let them


@dataclass(frozen=True)
class Particle:
    """A density map below the data folder, and the diameter (Å) that it is picked with.

    `scaled` stretches the map's longest axis to that diameter.
    """

    name: str
    map: str
    diameter: float
    scaled: bool = False

    def template(self, data: Path, voxel_size: float) -> Template:
        """Return the density, sampled for a tomogram of `voxel_size` Å."""
        return map_template(str(data / f"{self.map}.mrc"), self.diameter if self.scaled else None, voxel_size)


PARTICLES = {
    one.name: one
    for one in (
        Particle("apo-ferritin", "maps_10A/6pxm", 130.0),
        Particle("rubisco", "maps_5A/1bxn", 120.0),
        Particle("beta-galactosidase", "maps_10A/1f4a", 180.0),
        Particle("thyroglobulin", "maps_10A/7n4y", 250.0),
        Particle("ribosome", "maps_10A/6qzp", 290.0),
        Particle("virus-like-particle", "maps_10A/8tux", 300.0),
        Particle("capsid-400", "maps_10A/8tux", 400.0, scaled=True),
        Particle("capsid-1000", "maps_10A/8tux", 1000.0, scaled=True),
    )
}


@dataclass(frozen=True)
class SceneSpec:
    """Everything about a tomogram.

    kind : "field" (particles among distractors, gold and a membrane), "cell" (the same, packed with
        other matter), "carboxysome" (rubisco in a shell, other proteins outside), or "file" (the
        simulated test tomogram that `name` is the stem of).
    width : edge (diameters) of the field; its depth is less than half of that.
    """

    kind: Literal["field", "cell", "carboxysome", "file"]
    particle: str
    seed: int = 0
    snr: float = 0.05
    width: float = 7.2
    name: str = ""

    @property
    def key(self) -> str:
        """A name for its files."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.kind}_{self.particle}_{self.seed}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, eq=False)
class Scene:
    """A tomogram with the truth of its particle, how it was imaged, and the mask of its shell, if any."""

    tomogram: Tomogram
    truth: Picks
    imaging: ImagingOptions
    mask: Path | None = None

    def voxels(self) -> npt.NDArray[np.float32]:
        """Return all voxels (z, y, x)."""
        z, y, x = self.tomogram.shape
        return self.tomogram.read((slice(0, z), slice(0, y), slice(0, x)))


def open_scene(spec: SceneSpec, *, data: Path, folder: Path) -> Scene:
    """Return a scene, simulated and written into `folder` where it is not there yet."""
    if spec.kind == "file":
        return _test_file(spec, data / "sim10A")
    path = folder / f"{spec.key}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _simulate(spec, data, folder)
    truth = json.loads(path.read_text())
    mask = folder / f"{spec.key}_mask.mrc"
    picks = _picks(truth["zyx"], truth["rotations"], truth["voxel_size"], spec.key)
    tomogram = open_tomogram(folder / f"{spec.key}.mrc", name=spec.key)
    imaging = ImagingOptions(**truth["imaging"])
    return Scene(tomogram, picks, imaging, mask if mask.exists() else None)


def options_of(spec: SceneSpec, data: Path) -> PhantomOptions:
    """Return how a scene is made.

    Voxels are 10 Å, or a twentieth of a particle that is longer than 300 Å. The depth is 3.2 diameters;
    there are as many particles as lie in a field of 7.2 diameters at 24 of them.
    """
    particle = PARTICLES[spec.particle]
    voxel = 10.0 if particle.diameter <= 300 else particle.diameter / 20
    edge = math.ceil(spec.width * particle.diameter / voxel)
    depth = math.ceil(3.2 * particle.diameter / voxel)
    count = round(24 * (spec.width / 7.2) ** 2)
    busy = spec.kind == "cell"
    return PhantomOptions(
        shape=(depth, edge, edge),
        voxel_size=voxel,
        diameter=particle.diameter,
        particles=(str(data / f"{particle.map}.mrc"),),
        scale_maps=particle.scaled,
        count=count,
        distractors=3 * count if busy else count // 2,
        distractor_sizes=(0.35, 0.8) if busy else (0.35, 0.6),
        filaments=6 if busy else 1,
        gold=2,
        vesicles=1,
        sheets=1 if busy else 0,
        separation=0.7 if busy else 0.9,
        snr=spec.snr,
    )


def _simulate(spec: SceneSpec, data: Path, folder: Path) -> None:
    """Write the tomogram, the mask of its shell and, last, the truth."""
    options = options_of(spec, data)
    if spec.kind == "carboxysome":
        phantom, inside = _carboxysome(options, data, spec.seed)
        write_mrc(folder / f"{spec.key}_mask.mrc", inside, options.voxel_size)
    else:
        phantom = simulate_phantom(options, seed=spec.seed)
    write_mrc(folder / f"{spec.key}.mrc", phantom.volume, options.voxel_size)
    truth = phantom.picks()
    imaging = {field: getattr(options, field) for field in ImagingOptions.__dataclass_fields__}
    record = {"zyx": truth.zyx.tolist(), "rotations": np.asarray(truth.rotations).tolist()}
    temporary = folder / f".{spec.key}.json.part"
    temporary.write_text(json.dumps(record | {"voxel_size": options.voxel_size, "imaging": imaging}))
    temporary.replace(folder / f"{spec.key}.json")


def _carboxysome(options: PhantomOptions, data: Path, seed: int) -> tuple[Phantom, npt.NDArray[np.int8]]:
    """Return a closed shell full of particles with other proteins outside, and where its inside is."""
    placing, noise = (np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(2))
    options = replace(options, shape=(options.shape[1],) * 3)
    geometry = plan_geometry(options, options.shape, options.voxel_size, 4)
    nz, ny, nx = (n + 2 * p for n, p in zip(options.shape, geometry.pad, strict=True))
    canvas = Canvas(np.zeros((nz, nx, ny), dtype=np.float32), geometry.pad, options.shape)
    voxel, middle = options.voxel_size, (np.array(options.shape) - 1) / 2
    radius = min(options.shape) * voxel / 2 - SHELL
    depth = radius - _distances(canvas.slab, middle + geometry.pad) * voxel  # Å inside the outer face
    wall = (
        1 / (1 + np.exp(-np.clip(depth / 4, -30, 30))) / (1 + np.exp(np.clip((depth - SHELL) / 4, -30, 30)))
    )
    canvas.density += wall.transpose(0, 2, 1).astype(np.float32)
    template = map_template(options.particles[0], None, voxel)
    room = (radius - SHELL - template.radius) / voxel
    _pack(canvas, options, placing, (template, "target", 20000), (0.0, room))
    for other in OTHERS:
        outside = ((radius + 80) / voxel, float(max(options.shape)))
        _pack(
            canvas,
            options,
            placing,
            (map_template(str(data / f"{other}.mrc"), None, voxel), "distractor", 60),
            outside,
        )
    images, _ = expose(project(canvas.density, options, geometry.width), options, geometry, noise)
    volume = back_project(images, options, geometry)
    volume = (volume - volume.mean()) / volume.std()
    inside = (_distances(options.shape, middle) * voxel < radius - SHELL / 2).astype(np.int8)
    return Phantom("carboxysome", volume.astype(np.float32), options, seed, tuple(canvas.objects)), inside


def _pack(
    canvas: Canvas,
    options: PhantomOptions,
    rng: np.random.Generator,
    what: tuple[Template, Literal["target", "distractor"], int],
    shell: tuple[float, float],
) -> None:
    """Try to put a particle at so many points between two distances (voxels) from the field's middle."""
    template, role, tries = what
    least = _SEPARATION * options.diameter / options.voxel_size
    middle = (np.array(options.shape) - 1) / 2
    rim = template.radius / options.voxel_size
    for _ in range(tries):
        at = rim + (np.array(options.shape) - 1 - 2 * rim) * rng.random(3)
        if not shell[0] <= np.linalg.norm(at - middle) <= shell[1] or (at < 0).any():
            continue
        taken = np.array([one.zyx for one in canvas.objects]).reshape(-1, 3)
        if len(taken) and np.linalg.norm(taken - at, axis=1).min() < least:
            continue
        rotation = Rotation.from_quat(rng.normal(size=4)).as_matrix()
        stamp, corner = stamp_of(template, at + np.array(canvas.pad), rotation, options.voxel_size)
        if canvas.paint(stamp, corner):
            where = (float(at[0]), float(at[1]), float(at[2]))
            canvas.objects.append(Placed(template.kind, role, where, rotation, template.diameter))


def _distances(shape: Sequence[int], middle: Array) -> Array:
    z, y, x = ((np.arange(n) - m) ** 2 for n, m in zip(shape, middle, strict=True))
    distances: Array = np.sqrt(z[:, None, None] + y[None, :, None] + x[None, None, :])
    return distances


def _test_file(spec: SceneSpec, folder: Path) -> Scene:
    record = json.loads((folder / f"{spec.name}.json").read_text())
    chosen = [one for one in record["particles"] if one["object"] == spec.particle]
    zyx = [[one["z"], one["y"], one["x"]] for one in chosen]
    turned = [one["rotation_matrix"] for one in chosen]
    truth = _picks(zyx, turned, record["voxel_A"], spec.name)
    # The file says no dose and no envelope.
    imaging = ImagingOptions(defocus=record["defocus_um"], dose=0.0, b_factor=0.0)
    return Scene(open_tomogram(folder / f"{spec.name}.mrc", name=spec.name), truth, imaging)


def _picks(zyx: object, rotations: object, voxel_size: float, name: str) -> Picks:
    points = np.asarray(zyx, dtype=np.float64).reshape(-1, 3)
    turned = np.asarray(rotations, dtype=np.float64).reshape(-1, 3, 3)
    return Picks(points, np.ones(len(points), np.float32), turned, voxel_size=voxel_size, tomogram=name)
