"""What the base picker is taught: simulated tomograms of many shapes, each imaged in its own way.

`train_base` is the whole recipe: it simulates the tomograms, puts each on the working grid where the
particle measures 20 voxels, keeps them in a folder, and trains. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.calibration import calibrate
from tomocpt_stream.crops import Example, Sampling, example
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.loop import learn
from tomocpt_stream.network import ARCHITECTURES
from tomocpt_stream.phantom import PhantomOptions, simulate_phantom
from tomocpt_stream.picks import Picks
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.runs import STATE, alone_in, claim
from tomocpt_stream.shapes import BLOB, SHAPES_TRAIN
from tomocpt_stream.train_options import TrainOptions
from tomocpt_stream.volume import ingest, open_volume
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from tomocpt_stream.blocks import Window
    from tomocpt_stream.loop import Listener
    from tomocpt_stream.picker import Picker

# Seeds of validation tomograms start here; those of training start at 0.
_HELD = 1_000_000
_RADIUS = 10.0
# Particles in 64 x 144 x 144 working voxels that pack without crowding.
_DENSITY = 30 / (64 * 144 * 144)


def base_options(*, steps: int = 3000, seed: int = 0) -> TrainOptions:
    """Return the options that the shipped picker was trained with."""
    return TrainOptions(
        steps=steps,
        batch_size=2,
        learning_rate=1e-3,
        warm_up=100,
        average=0.995,
        precision="bfloat16",
        seed=seed,
        sampling=Sampling(
            radius=_RADIUS,
            positive=0.7,
            augmentation=Augmentation(turns=True, scale=0.15, shift=0.1, noise=0.2, blur=1.0, sharpen=0.5),
        ),
        checkpoint_every=100,
        validation_crops=32,
    )


@dataclass(frozen=True)
class Recipe:
    """Which tomograms are simulated, and how many of them are kept for validation."""

    tomograms: int = 200
    validation: int = 12
    seed: int = 0
    maps: tuple[str, ...] = ()
    """Density maps to learn from beside the shapes; with them the tomograms are harder, see `draw_hard`."""
    held_maps: tuple[str, ...] = ()
    """Density maps of the validation tomograms; none of them may be learnt from."""
    options: TrainOptions = field(default_factory=base_options)

    def __post_init__(self) -> None:
        """Refuse a map on both sides."""
        both = sorted({Path(one).name for one in self.maps} & {Path(one).name for one in self.held_maps})
        if both or bool(self.maps) != bool(self.held_maps):
            raise PlanError(
                f"maps to learn from {len(self.maps)}, for validation {len(self.held_maps)}"
                + (f", in both {', '.join(both)}" if both else ""),
                expected="maps of different proteins for both, or none",
                remedy="keep at least three proteins for validation alone",
            )


def train_base(
    folder: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    start: Picker | None = None,
    workers: int = 2,
    devices: int = 1,
    progress: Progress = silent,
    listeners: Sequence[Listener] = (),
) -> Picker:
    """Return a picker trained on simulated tomograms alone; `folder` keeps them and the checkpoints.

    A folder of an earlier, interrupted run with the same recipe is taken up where it was left; one of
    another run is a CheckpointError. `start` gives the first weights; PlanError where it knows particles of
    another radius, or in other windows, or is of another architecture.
    """
    recipe, place = recipe or Recipe(), Path(folder)
    if start is not None:
        _refuse_other(start, recipe.options)
    seeds = [recipe.seed + k for k in range(recipe.tomograms)]
    held = [recipe.seed + _HELD + k for k in range(recipe.validation)]
    drawn = dict.fromkeys(seeds, recipe.maps) | dict.fromkeys(held, recipe.held_maps)
    maps = {"maps": _named(recipe.maps), "held_maps": _named(recipe.held_maps)}
    with alone_in(place):
        # Tomograms are found again by their seeds, whatever was simulated into them.
        claim(place / "tomograms", maps)
        asked = {"tomograms": len(seeds), "validation": len(held), "seed": recipe.seed}
        parent = {"parent": None if start is None else start.fingerprint}
        account = asked | parent | maps | {"options": recipe.options.to_json()}
        claim(place / "run", account, begun=place / "run" / STATE)
        examples = prepare(place / "tomograms", drawn, workers=workers, progress=progress)
        record = _record(recipe, start, particles=sum(len(item.centres) for item in examples[: len(seeds)]))
        picker = learn(
            examples[: len(seeds)],
            validation=examples[len(seeds) :],
            options=recipe.options,
            folder=place / "run",
            start_from=start,
            provenance=record,
            devices=devices,
            listeners=listeners,
        )
        if not held:
            return picker
        return calibrate(picker, examples[len(seeds) :], provenance=record, progress=progress)


def _record(recipe: Recipe, start: Picker | None, *, particles: int) -> dict[str, Any]:
    """Return what the picker's provenance says of its training."""
    record = {
        "command": (
            f"tomocpt-stream train --steps {recipe.options.steps} --tomograms {recipe.tomograms} "
            f"--validation {recipe.validation} --seed {recipe.seed}"
            + "".join(f" {word}" for word in _unusual(recipe.options))
            + (" --maps FOLDER --held-maps FOLDER" if recipe.maps else "")
            + (" --picker PARENT" if start else "")
        ),
        "data": "simulated tomograms",
        "tomograms": recipe.tomograms,
        "validation_tomograms": recipe.validation,
        "particles": particles,
        "first_seed": recipe.seed,
        "shapes": [*SHAPES_TRAIN, "blob"],
        "maps": _named(recipe.maps),
        "held_maps": _named(recipe.held_maps),
    }
    if start is not None:
        record |= {"parent": start.fingerprint, "parent_provenance": start.metadata["provenance"]}
    return record


def _unusual(options: TrainOptions) -> Iterator[str]:
    """Yield what a command says of a run that has not the options of the shipped picker."""
    usual = base_options()
    if options.batch_size != usual.batch_size:
        yield f"--batch-size {options.batch_size}"
    names = [name for name, one in ARCHITECTURES.items() if one == options.architecture]
    if options.architecture != usual.architecture:
        yield f"--architecture {''.join(names) or 'OTHER'}"


def _refuse_other(start: Picker, options: TrainOptions) -> None:
    """Refuse a picker that would be taught what its own file does not say, or whose weights do not fit."""
    own, sampling = (start.particle_radius, start.window), options.sampling
    if own != (sampling.radius, sampling.window):
        raise PlanError(
            f"a picker of particles of {own[0]:g} voxels radius in windows of {_said(own[1])}",
            expected=f"{sampling.radius:g} voxels in windows of {_said(sampling.window)}, as are simulated",
            remedy="begin with another picker, or teach this one on your own tomograms (finetune)",
        )
    there, here = start.metadata["architecture"], options.architecture
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        raise PlanError(
            f"a picker whose network has {', '.join(f'{key} {there.get(key)}' for key in differing)}",
            expected=f"that of the run: {', '.join(f'{key} {here[key]}' for key in differing)}",
            remedy="leave --architecture out, or begin from nothing",
        )


def _said(window: Window) -> str:
    return f"{window.shape} voxels with halos of {window.halo}"


def prepare(
    folder: Path, drawn: Mapping[int, tuple[str, ...]], *, workers: int = 2, progress: Progress = silent
) -> list[Example]:
    """Return one example for each seed, simulated into `folder` unless it is there already.

    `drawn` gives each seed its density maps; without any the tomogram is one of `draw_phantom`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in drawn if not (folder / f"{seed}.json").exists()]
    done = len(drawn) - len(missing)
    if missing:
        # spawn: a fork would copy torch's threads in whatever state they are.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            maps = [drawn[seed] for seed in missing]
            for _ in pool.map(_simulate, [folder] * len(missing), missing, maps):
                done += 1
                progress("simulate", done, len(drawn))
    return [_open(folder, seed, maps) for seed, maps in drawn.items()]


def draw_phantom(seed: int) -> tuple[PhantomOptions, float]:
    """Return the options of one simulated tomogram and the voxel size (Å) of its working grid.

    The ranges span what users bring: 6 to 15 Å a voxel, particles of 12 to 30 voxels, SNR 0.025 to 0.2,
    any common tilt range, raw or phase-flipped, sparse to touching, with what must not be picked:
    smaller particles, filaments, gold, membranes, ice.
    """
    rng = np.random.default_rng([seed, 20])
    voxel_size = float(rng.uniform(6, 15))
    across = 20.0 if rng.random() < 0.3 else float(rng.uniform(12, 30))
    diameter = across * voxel_size
    # `pick` keeps a grid that is within 5 % of the working one, so the sizes vary by as much.
    target = diameter / (2 * _RADIUS) * (1.0 if across == 20.0 else float(rng.uniform(0.95, 1.05)))
    working = (int(rng.integers(48, 81)), int(rng.integers(128, 177)), int(rng.integers(128, 177)))
    z, y, x = (max(8, round(n * target / voxel_size)) for n in working)
    count = max(4, round(_DENSITY * math.prod(working) * float(rng.uniform(0.4, 1.6))))
    named = [str(kind) for kind in rng.permutation(SHAPES_TRAIN)[: int(rng.integers(1, 5))]]
    blobs = [f"blob:{int(rng.integers(1 << 30))}" for _ in range(int(rng.integers(1, 6)))]
    options = PhantomOptions(
        shape=(z, y, x),
        voxel_size=voxel_size,
        diameter=diameter,
        particles=(*named, *blobs),
        count=count,
        distractors=int(rng.integers(0, 1 + count)),
        distractor_sizes=(0.3, float(rng.uniform(0.45, 0.62))),
        filaments=int(rng.integers(0, 4)),
        gold=int(rng.integers(0, 7)) if rng.random() < 0.6 else 0,
        gold_diameter=diameter * float(rng.uniform(0.2, 0.75)),
        vesicles=int(rng.integers(0, 3)),
        sheets=int(rng.random() < 0.25),
        membrane_thickness=float(rng.uniform(32, 48)),
        ice=int(rng.integers(1, 3)) if rng.random() < 0.2 else 0,
        separation=float(rng.uniform(0.6, 1.0)),
        margin=None if rng.random() < 0.5 else 0.0,
        tilt_range=float(rng.choice([45, 51, 54, 60, 60, 60, 66])),
        tilt_step=float(rng.choice([2, 3, 3, 3, 4])),
        defocus=float(rng.uniform(1.5, 5.5)),
        b_factor=float(rng.uniform(100, 600)),
        dose=float(rng.uniform(60, 140)),
        snr=float(np.exp(rng.uniform(np.log(0.025), np.log(0.2)))),
        ctf_correction="flip" if rng.random() < 0.5 else "none",
        reconstruction_filter=("ramp", "ramp", "hamming", "cosine")[int(rng.integers(4))],
    )
    return options, target


def draw_hard(seed: int, maps: tuple[str, ...]) -> tuple[PhantomOptions, float]:
    """Return the options of one harder tomogram, with particles of density maps, as `draw_phantom` does.

    In two of three the particles are one to four of the maps, scaled to the diameter, with a few blobs.
    Half of them have objects larger than the particle, a third are crowded up to touching, and as many
    look denoised or were corrected by a Wiener-like filter.
    """
    options, target = draw_phantom(seed)
    rng = np.random.default_rng([seed, 21])
    mapped, large, crowded, smooth, wiener = rng.random(5)
    some = [maps[k] for k in rng.permutation(len(maps))[: int(rng.integers(1, 5))]]
    changes: dict[str, Any] = {}
    if mapped < 2 / 3:
        blobs = [kind for kind in options.particles if kind.startswith(BLOB)]
        changes |= {"particles": (*some, *blobs[: int(rng.integers(3))]), "scale_maps": True}
    if large < 1 / 2:
        changes |= {"large": int(rng.integers(1, 6)), "large_sizes": (1.6, float(rng.uniform(1.8, 2.8)))}
    if crowded < 1 / 3:
        count = round(options.count * float(rng.uniform(1.5, 3.0)))
        changes |= {"count": count, "separation": float(rng.uniform(0.5, 0.65))}
    if smooth < 1 / 3:
        changes["smoothing"] = options.diameter * float(rng.uniform(0.03, 0.08))
    if wiener < 1 / 3:
        changes["ctf_correction"] = "wiener"
    return replace(options, **changes), target


def _named(maps: Sequence[str]) -> list[dict[str, str]]:
    """Return name and hash of each density map."""
    return [
        {"name": Path(one).name, "sha256": hashlib.sha256(Path(one).read_bytes()).hexdigest()} for one in maps
    ]


def _simulate(folder: Path, seed: int, maps: tuple[str, ...] = ()) -> None:
    """Simulate one tomogram, put it on the working grid and write its truth; the truth comes last."""
    options, target = draw_hard(seed, maps) if maps else draw_phantom(seed)
    phantom = None
    while phantom is None:
        try:
            phantom = simulate_phantom(options, seed=seed, name=str(seed))
        except SourceError:
            # Random packing found no room: the same field with fewer of everything.
            options = _thinned(options)
    ingest(phantom.tomogram, folder / f"{seed}.zarr", voxel_size=target)
    kept = asdict(options) | {"particles": [Path(kind).name for kind in options.particles]}
    truth = {"zyx": phantom.picks().zyx.tolist(), "options": kept, "voxel_size": target}
    truth["maps"] = [Path(one).name for one in maps]
    write_whole(folder / f"{seed}.json", json.dumps(truth))


def _thinned(options: PhantomOptions) -> PhantomOptions:
    if options.count <= 1:
        raise SourceError(
            f"no room for one particle of {options.diameter:g} Å in {options.shape} voxels",
            expected="a field that holds a particle",
            remedy="choose another seed",
        )
    fewer: dict[str, Any] = {
        name: getattr(options, name) * 3 // 4
        for name in ("count", "distractors", "large", "filaments", "gold", "vesicles", "ice")
    }
    return replace(options, **fewer)


def _open(folder: Path, seed: int, maps: tuple[str, ...]) -> Example:
    truth = json.loads((folder / f"{seed}.json").read_text())
    asked = [Path(one).name for one in maps]
    if truth.get("maps", asked) != asked:
        raise PlanError(
            f"{folder} with a tomogram {seed} drawn from {', '.join(truth['maps']) or 'no maps'}",
            expected=f"one drawn from {', '.join(asked) or 'no maps'}, as the recipe says",
            remedy="choose another folder for another recipe",
        )
    volume = open_volume(folder / f"{seed}.zarr")
    zyx = np.array(truth["zyx"], dtype=np.float64).reshape(-1, 3)
    return example(volume, Picks(zyx, np.ones(len(zyx), dtype=np.float32)))
