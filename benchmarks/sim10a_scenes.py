"""The test tomograms of the look-alikes' benchmark: the simulated files, and more of the same make.

The files are three tomograms of 92 particles of eight kinds. More of them are made by this package's own
phantom from the same maps, in the same numbers, by the same optics; each keeps its truth in the same form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from paper_scenes import PARTICLES

from tomocpt_stream import Picks, Tomogram, open_tomogram
from tomocpt_stream.phantom import Phantom, PhantomOptions, simulate_phantom, write_mrc
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

VOXEL = 10.0
"""Å, of the maps' tomograms."""

SEED = 6100
"""Of the first tomogram made here; the next ones count on. The files have 11 to 13."""

# In turn, as in the three files: projection signal-to-noise ratio, defocus in µm.
_OPTICS = ((0.05, 3.0), (0.04, 3.5), (0.05, 3.2))
_STEPS = 25.0  # of int8, to one standard deviation
# Particles of the files come as near as 0.93 to 0.96 sums of their radii.
_SEPARATION = 0.95


@dataclass(frozen=True)
class Kind:
    """A kind of particle: map below the data folder, number in a tomogram, diameter to pick with (Å).

    `aim` is the F1 to be reached after fine-tuning; distractors have neither aim nor diameter.
    """

    name: str
    map: str
    count: int
    diameter: float = 0.0
    aim: float = 0.0


def _class(name: str, count: int, aim: float) -> Kind:
    return Kind(name, PARTICLES[name].map, count, PARTICLES[name].diameter, aim)


KINDS = (  # from the largest to the smallest: in this order they find room
    _class("virus-like-particle", 6, 0.95),
    _class("ribosome", 14, 0.95),
    _class("thyroglobulin", 12, 0.90),
    _class("beta-galactosidase", 14, 0.90),
    Kind("distractor-proteasome", "maps_5A/3j9i", 6),
    Kind("distractor-cdc48", "maps_5A/3cf3", 6),
    _class("apo-ferritin", 20, 0.95),
    _class("rubisco", 14, 0.80),
)
CLASSES = {one.name: one for one in KINDS if one.aim}


@dataclass(frozen=True, eq=False)
class Scene:
    """A tomogram and all that lies in it: `truth` has the particles of each kind, distractors as well."""

    tomogram: Tomogram
    truth: dict[str, Picks]

    @property
    def name(self) -> str:
        """The tomogram's name."""
        return self.tomogram.name

    def of(self, names: Iterable[str]) -> Picks:
        """Return the particles of some kinds as one table."""
        chosen = [self.truth[name] for name in names if name in self.truth]
        zyx = np.concatenate([np.zeros((0, 3)), *(one.zyx for one in chosen)])
        return _picks(zyx, self.name)

    def all(self) -> Picks:
        """Return every particle, the distractors too."""
        return self.of(self.truth)

    def others(self, name: str) -> Picks:
        """Return the particles of the other classes: what a person knows who has picked all classes."""
        return self.of(one for one in CLASSES if one != name)


def open_scene(folder: Path, name: str) -> Scene:
    """Return the tomogram name.mrc of a folder with the truth in name.json."""
    record = json.loads((folder / f"{name}.json").read_text())
    found: dict[str, list[list[float]]] = {}
    for one in record["particles"]:
        found.setdefault(one["object"], []).append([one["z"], one["y"], one["x"]])
    truth = {kind: _picks(points, name) for kind, points in found.items()}
    return Scene(open_tomogram(folder / f"{name}.mrc", name=name), truth)


def more_scene(number: int, *, data: Path, folder: Path, kinds: Sequence[Kind] = KINDS) -> Scene:
    """Return a tomogram of the same make as the files, simulated into `folder` unless it is there."""
    name = f"more_{number}"
    if not (folder / f"{name}.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = options_of(number, data, kinds)
        phantom = simulate_phantom(options, seed=SEED + number, name=name)
        coded = np.clip(np.rint(phantom.volume * _STEPS), -127, 127).astype(np.int8)
        write_mrc(folder / f"{name}.mrc", coded, options.voxel_size)
        write_whole(folder / f"{name}.json", json.dumps(record_of(phantom, kinds)))
    return open_scene(folder, name)


def options_of(number: int, data: Path, kinds: Sequence[Kind] = KINDS) -> PhantomOptions:
    """Return how a tomogram of this number is made: nothing but the particles lies in its ice."""
    snr, defocus = _OPTICS[number % len(_OPTICS)]
    each = [str(data / f"{kind.map}.mrc") for kind in kinds for _ in range(kind.count)]
    return PhantomOptions(
        shape=(96, 256, 256),
        voxel_size=VOXEL,
        diameter=max(kind.diameter for kind in kinds),
        particles=tuple(each),
        count=len(each),
        distractors=0,
        filaments=0,
        gold=0,
        vesicles=0,
        separation=_SEPARATION,
        snr=snr,
        defocus=defocus,
    )


def record_of(phantom: Phantom, kinds: Sequence[Kind] = KINDS) -> dict[str, Any]:
    """Return the truth of a phantom in the form of the files."""
    named = {kind.map.rpartition("/")[2]: kind.name for kind in kinds}
    return {
        "name": phantom.name,
        "voxel_A": phantom.options.voxel_size,
        "seed": phantom.seed,
        "projection_snr": phantom.options.snr,
        "defocus_um": phantom.options.defocus,
        "particles": [
            {"object": named[one.kind], "pdb": one.kind}
            | dict(zip("zyx", one.zyx, strict=True))
            | {"rotation_matrix": one.rotation.tolist()}
            for one in phantom.objects
        ],
    }


def _picks(points: Any, name: str) -> Picks:
    zyx = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    return Picks(zyx, np.ones(len(zyx), np.float32), voxel_size=VOXEL, tomogram=name)
