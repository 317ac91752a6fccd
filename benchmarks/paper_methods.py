"""Who picks in the paper's experiments: a network, template matching, a difference of Gaussians.

Each gives all its candidates, 0.75 diameters apart, with scores; the best threshold is taken afterwards,
for all alike.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from orientations import one_of_each, point_group, rotation_list
from paper_scenes import PARTICLES, Scene, SceneSpec, open_scene
from scipy import ndimage
from template_matching import match_template

from tomocpt_stream import (
    LabelledTomogram,
    Picker,
    PickOptions,
    Picks,
    find_peaks,
    fine_tune,
    ingest,
    load_picker,
    pick,
    train,
)
from tomocpt_stream.pipeline import plan_pick
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from tomocpt_stream.loop import Step
    from tomocpt_stream.train_options import Precision

FLOOR = 0.02
"""Score below which a network's candidates are not kept."""

_PRECISION: Precision = "bfloat16"  # of lessons; half of the time of float32 on a CPU that has it

_WIDTHS = (2.5, 3.5, 4.5, 5.5, 6.5)  # of the narrower Gaussian, working voxels; the particle's radius is 10
_WIDER = 1.6


@dataclass(frozen=True)
class Bench:
    """Where maps and test files lie, where everything is kept, and which picker is the shipped one."""

    data: Path
    folder: Path
    picker: str = "base"
    tick: Callable[[], None] = lambda: None
    """Called now and then; raises where the time of this part is over."""

    def scene(self, spec: SceneSpec) -> Scene:
        """Return a scene, kept in the folder."""
        folder = self.folder / "tomograms"
        if spec.kind != "file" and not (folder / f"{spec.key}.json").exists():
            self.tick()
        return open_scene(spec, data=self.data, folder=folder)


@dataclass(frozen=True)
class Network:
    """A picker as it is shipped, fine-tuned on scenes, or trained on them from nothing.

    One from nothing has the shipped one's architecture. `rate` is the learning rate.
    """

    start: Literal["shipped", "nothing"] = "shipped"
    lessons: tuple[SceneSpec, ...] = ()
    epochs: int = 0
    rate: float = 5e-5
    batch: int = 4
    label: Literal["gaussian", "binary"] = "gaussian"
    masked: bool = False
    """Pick within the scene's mask only."""

    def candidates(self, bench: Bench, spec: SceneSpec, name: str) -> Picks:
        """Return the candidates of a scene; its map stays in the folder as maps/name.zarr."""
        scene = bench.scene(spec)
        return pick(
            scene.tomogram,
            self.picker(bench),
            PickOptions(PARTICLES[spec.particle].diameter, threshold=FLOOR, contrast="dark"),
            mask=scene.mask if self.masked else None,
            keep_heatmap=str(bench.folder / "maps" / f"{name}.zarr"),
        )

    def unchanged(self, bench: Bench) -> bool:
        """Return whether a lesson left the shipped picker as it was: no epoch had a lower validation loss."""
        if self.start != "shipped" or not self.lessons:
            return False
        shipped = load_picker(bench.picker).fingerprint
        note = self._place(bench, shipped) / "fingerprint.txt"
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, self.picker(bench).fingerprint)
        return note.read_text() == shipped

    def _place(self, bench: Bench, shipped: str) -> Path:
        """Return the folder of the lesson."""
        names = [spec.key for spec in self.lessons]
        asked = [shipped, self.start, names, self.epochs, self.rate, self.batch, self.label, _PRECISION]
        return bench.folder / "pickers" / digest(asked)

    def picker(self, bench: Bench) -> Picker:
        """Return the picker, taught where it is to be taught; lessons that were begun go on."""
        shipped = load_picker(bench.picker)
        if not self.lessons:
            return shipped
        scenes = [bench.scene(spec) for spec in self.lessons]
        examples = [
            LabelledTomogram(scene.tomogram, scene.truth, PARTICLES[spec.particle].diameter, contrast="dark")
            for spec, scene in zip(self.lessons, scenes, strict=True)
        ]
        folder = self._place(bench, shipped.fingerprint)

        def listen(step: Step) -> None:
            if step.step % 10 == 0 or step.step == step.steps:
                print(f"    step {step.step} of {step.steps}: loss {step.loss:.3f}", flush=True)
            bench.tick()

        if self.start == "nothing":
            return train(
                examples,
                folder=folder,
                architecture=shipped.metadata["architecture"],
                window=shipped.window,
                label=self.label,
                particle_radius=shipped.particle_radius,
                epochs=self.epochs,
                learning_rate=self.rate,
                schedule="cosine",
                stop_after=0,
                batch_size=self.batch,
                precision=_PRECISION,
                on_step=listen,
            )
        return fine_tune(
            examples,
            picker=shipped,
            folder=folder,
            epochs=self.epochs,
            learning_rate=self.rate,
            batch_size=self.batch,
            precision=_PRECISION,
            on_step=listen,
        )


@dataclass(frozen=True)
class Matching:
    """Template matching with the particle's true map, on volumes binned `binning` times."""

    step: float
    binning: int = 1

    def candidates(self, bench: Bench, spec: SceneSpec) -> Picks:
        """Return the peaks of a scene, with rotations."""
        scene, particle = bench.scene(spec), PARTICLES[spec.particle]
        name, file_voxel = scene.tomogram.name, scene.tomogram.voxel_size
        voxel = file_voxel * self.binning
        template = particle.template(bench.data, voxel)
        group = point_group(template.density, template.centre)
        rotations = one_of_each(rotation_list(self.step), group)
        volume = binned(scene.voxels(), self.binning)
        matched = match_template(volume, template, rotations, voxel_size=voxel, imaging=scene.imaging)
        picks = matched.picks(voxel_size=voxel, diameter=particle.diameter, name=name)
        # Voxel i of the binned volume is the mean of voxels i b to i b + b - 1.
        zyx = picks.zyx * self.binning + (self.binning - 1) / 2
        return Picks(zyx, picks.score, picks.rotations, voxel_size=file_voxel, tomogram=name)


@dataclass(frozen=True)
class Gaussians:
    """A difference of two Gaussians, on the network's own working volume; `width` is in its voxels."""

    width: float

    def candidates(self, bench: Bench, spec: SceneSpec) -> Picks:
        """Return the peaks of a scene, protein dark."""
        tomogram, diameter = bench.scene(spec).tomogram, PARTICLES[spec.particle].diameter
        grid, _ = plan_pick(tomogram, load_picker(bench.picker), PickOptions(diameter))
        store = bench.folder / "volumes" / f"{tomogram.name}_{grid.voxel_size:g}.zarr"
        volume = ingest(tomogram, store, voxel_size=grid.voxel_size)
        low, middle, high = volume.percentiles
        voxels = np.clip((np.asarray(volume.array[:]) - middle) / (high - low), -3, 3)
        narrow, wide = (ndimage.gaussian_filter(voxels, s) for s in (self.width, _WIDER * self.width))
        peaks = find_peaks(wide - narrow, threshold=0.0, min_distance=0.75 * diameter / grid.voxel_size)
        zyx = tomogram.frame.to_file(grid.to_source(peaks.zyx))
        return Picks(zyx, peaks.score, voxel_size=tomogram.frame.file_voxel_size, tomogram=tomogram.name)


Method = Network | Matching | Gaussians


def acquaintance(picker: Picker, maps: Mapping[str, str]) -> str:
    """Return a line on which of some density maps, by name, a picker has learnt from or was chosen by."""
    lives = [picker.metadata["provenance"]]
    while parent := lives[-1].get("parent_provenance"):
        lives.append(parent)
    words = []
    for key, what in (("maps", "has learnt from the maps of"), ("held_maps", "was chosen and calibrated by")):
        known = {one["name"].partition(".")[0] for life in lives for one in life.get(key, [])}
        found = [name for name, map_ in maps.items() if map_.rpartition("/")[2] in known]
        words.append(f"{what} {', '.join(found) or 'none'}")
    return f"- of the particles here the picker {'; it '.join(words)}"


def gaussians() -> tuple[Gaussians, ...]:
    """Return the differences of Gaussians of which the best one counts."""
    return tuple(Gaussians(width) for width in _WIDTHS)


def binned(volume: npt.NDArray[np.float32], times: int) -> npt.NDArray[np.float32]:
    """Return means over cubes of `times` voxels an edge; what is left over at the far faces is cut off."""
    z, y, x = (n // times for n in volume.shape)
    cut = volume[: z * times, : y * times, : x * times]
    means: npt.NDArray[np.float32] = cut.reshape(z, times, y, times, x, times).mean(
        axis=(1, 3, 5), dtype=np.float32
    )
    return means


def digest(asked: Any) -> str:
    """Return a short name of plain data."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
