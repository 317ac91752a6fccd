"""Simulated tomograms whose truth is known: specimen, tilt series, weighted back-projection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mrcfile
import numpy as np
import numpy.typing as npt

from tomocpt_stream.errors import SourceError
from tomocpt_stream.imaging import ImagingOptions, back_project, expose, plan_geometry, project
from tomocpt_stream.picks import Picks
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.shapes import SHAPES_HELD_OUT, SHAPES_TRAIN
from tomocpt_stream.specimen import Placed, SpecimenOptions, build_specimen
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.whole import whole

__all__ = [
    "SHAPES_HELD_OUT",
    "SHAPES_TRAIN",
    "Phantom",
    "PhantomOptions",
    "simulate_phantom",
    "simulate_tomogram",
]

if TYPE_CHECKING:
    import os

    from tomocpt_stream.frame import Shape

Field = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PhantomOptions(SpecimenOptions, ImagingOptions):
    """Everything about a phantom but its seed: the fields of `SpecimenOptions` and `ImagingOptions`."""

    def __post_init__(self) -> None:
        SpecimenOptions.__post_init__(self)
        ImagingOptions.__post_init__(self)


@dataclass(frozen=True, eq=False)
class Phantom:
    """A simulated tomogram with everything that lies in it.

    `volume` is (z, y, x) float32 with mean 0 and standard deviation 1. `objects` are all objects
    whose centre lies in the field: targets, distractors, gold, membranes, ice.
    """

    name: str
    volume: Field
    options: PhantomOptions
    seed: int
    objects: tuple[Placed, ...]

    @property
    def tomogram(self) -> Tomogram:
        """The volume as a tomogram."""
        return open_tomogram(self.volume, voxel_size=self.options.voxel_size, name=self.name)

    def picks(self, *roles: str, kind: str | None = None) -> Picks:
        """Return the objects of the given roles (targets where none is given) as picks of score 1.

        Roles are "target", "distractor", "gold", "membrane" and "ice"; `kind` keeps one kind only.
        """
        chosen = [
            item for item in self.objects if item.role in (roles or ("target",)) and kind in (None, item.kind)
        ]
        nz, ny, nx = self.volume.shape
        shape: Shape = (nz, ny, nx)
        return Picks(
            zyx=np.array([item.zyx for item in chosen], dtype=np.float64).reshape(-1, 3),
            score=np.ones(len(chosen), dtype=np.float32),
            rotations=np.array([item.rotation for item in chosen], dtype=np.float64).reshape(-1, 3, 3),
            voxel_size=self.options.voxel_size,
            tomogram=self.name,
            shape=shape,
            particle=kind or "+".join(dict.fromkeys(item.kind for item in chosen)),
        )


def simulate_tomogram(
    options: PhantomOptions | None = None,
    *,
    seed: int = 0,
    name: str | None = None,
    progress: Progress = silent,
) -> tuple[Tomogram, Picks]:
    """Return a simulated tomogram and its targets; a seed gives the same voxels again.

    `simulate_phantom` also tells where everything else lies. Raises SourceError for a specimen
    that does not fit its field.
    """
    phantom = simulate_phantom(options, seed=seed, name=name, progress=progress)
    return phantom.tomogram, phantom.picks()


def simulate_phantom(
    options: PhantomOptions | None = None,
    *,
    seed: int = 0,
    name: str | None = None,
    progress: Progress = silent,
) -> Phantom:
    """Return a simulated tomogram with all that lies in it; see `PhantomOptions`.

    Placement and noise draw from streams of their own, so that one seed gives the same specimen at
    every signal-to-noise ratio.
    """
    options = options or PhantomOptions()
    placing, noise = (np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(2))
    thick = math.ceil(0.75 * options.diameter / options.voxel_size)  # the farthest a target sticks out
    geometry = plan_geometry(options, options.shape, options.voxel_size, thick)
    canvas = build_specimen(options, geometry.pad, placing)
    images = project(canvas.density, options, geometry.width, progress)
    objects = tuple(canvas.objects)
    del canvas
    images, _ = expose(images, options, geometry, noise)
    volume = back_project(images, options, geometry, progress)
    deviation = float(volume.std(dtype=np.float64))
    volume -= np.float32(volume.mean(dtype=np.float64))
    sign = 1.0 if options.contrast == "dark" else -1.0
    volume *= np.float32(sign / deviation if deviation > 0 else sign)
    return Phantom(name or f"phantom_{seed}", volume, options, seed, objects)


def write_mrc(path: str | os.PathLike[str], array: npt.NDArray[np.generic], voxel_size: float) -> None:
    """Write a volume (z, y, x) as an MRC file with its voxel size in Å; the file appears whole.

    int8, int16, uint16, float16 and float32 keep their type. An existing file is replaced.

    Raises
    ------
    SourceError
        When the array is not three-dimensional or its type has no MRC mode.
    """
    if array.ndim != 3 or array.dtype.name not in ("int8", "int16", "uint16", "float16", "float32"):
        raise SourceError(
            f"an array of {array.ndim} dimensions and type {array.dtype}",
            expected="a volume of int8, int16, uint16, float16 or float32",
            remedy="convert it with astype before writing",
        )
    with whole(Path(path)) as partial, mrcfile.new(partial, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(array))
        file.voxel_size = voxel_size
