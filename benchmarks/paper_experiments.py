"""The paper's experiments as lists of trials: who picks what in which tomograms, after which lessons.

A trial's candidates are kept under a name that says all they follow from, so that a run that was ended
goes on with the next trial, and figures that use the same candidates twice cost nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from orientations import point_group
from paper_methods import Bench, Matching, Method, Network, digest, gaussians
from paper_scenes import PARTICLES, SceneSpec
from paper_scores import scored

from tomocpt_stream import Picks, load_picker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from orientations import Array

MOST = 3000
"""Candidates kept of a tomogram, best first."""

TEST = 900  # seeds of tomograms that nothing learns from start here, those of lessons at 100
LESSON = 100


@dataclass(frozen=True)
class Preset:
    """How much is done: particles, tomograms, passes.

    width : edge of the fields in diameters. labels : particles that labels are compared on, after
    `label_lessons` tomograms in `label_epochs` by batches of `batch` crops. tuned : particles that are
    fine-tuned on `amounts` of tomograms, `epochs` each at `rate`. tests : test tomograms of a trial.
    enclosed : edge of a carboxysome's field in diameters, with `enclosed_lessons` tomograms and
    `enclosed_epochs` of fine-tuning. hard, noise : particles and signal-to-noise ratios of the harder
    cases. files : particles looked for in the test file, `files_taught` after fine-tuning on two others
    as well. angle, binning : of template matching.
    """

    name: str
    width: float
    labels: tuple[str, ...]
    label_lessons: int
    label_epochs: int
    batch: int
    tuned: tuple[str, ...]
    amounts: tuple[int, ...]
    epochs: int
    rate: float
    tests: int
    enclosed: float
    enclosed_lessons: int
    enclosed_epochs: int
    hard: tuple[str, ...]
    noise: tuple[float, ...]
    files: tuple[str, ...]
    files_taught: bool
    angle: float
    binning: int


SMALL = Preset(
    name="small",
    width=7.2,
    labels=("apo-ferritin", "thyroglobulin", "capsid-1000"),
    label_lessons=1,
    label_epochs=10,
    batch=2,
    tuned=("apo-ferritin",),
    amounts=(1, 2),
    epochs=4,
    rate=2e-4,
    tests=2,
    enclosed=8.0,
    enclosed_lessons=1,
    enclosed_epochs=2,
    hard=("apo-ferritin", "thyroglobulin"),
    noise=(0.02, 0.01),
    files=("apo-ferritin", "beta-galactosidase", "rubisco"),
    files_taught=False,
    angle=13.0,
    binning=2,
)
TINY = replace(
    SMALL,
    name="tiny",
    width=4.0,
    labels=("apo-ferritin", "capsid-1000"),
    label_epochs=1,
    amounts=(1,),
    epochs=1,
    tests=1,
    enclosed=6.0,
    enclosed_epochs=1,
    hard=("apo-ferritin",),
    noise=(0.02,),
    files=("apo-ferritin",),
    angle=40.0,
)
FULL = Preset(
    name="full",
    width=12.0,
    labels=("apo-ferritin", "beta-galactosidase", "thyroglobulin", "ribosome", "capsid-400", "capsid-1000"),
    label_lessons=5,
    label_epochs=40,
    batch=10,
    tuned=("apo-ferritin", "beta-galactosidase", "thyroglobulin"),
    amounts=(2, 3, 5),
    epochs=20,
    rate=5e-5,
    tests=5,
    enclosed=12.0,
    enclosed_lessons=2,
    enclosed_epochs=20,
    hard=("apo-ferritin", "beta-galactosidase", "thyroglobulin", "ribosome"),
    noise=(0.03, 0.02, 0.01),
    files=(
        "ribosome",
        "apo-ferritin",
        "virus-like-particle",
        "beta-galactosidase",
        "thyroglobulin",
        "rubisco",
    ),
    files_taught=True,
    angle=7.5,
    binning=1,
)


@dataclass(frozen=True)
class Trial:
    """One row: `who` picks in the scenes by one of `methods`, whichever is best.

    `masked` confines picks and truth to the masks of the scenes.
    """

    experiment: str
    case: str
    who: str
    methods: tuple[Method, ...]
    scenes: tuple[SceneSpec, ...]
    masked: bool = False

    @property
    def particle(self) -> str:
        """The particle that is looked for."""
        return self.scenes[0].particle


def rivals(preset: Preset) -> list[Trial]:
    """Return the trials on the test file: template matching and Gaussians against the shipped picker."""
    trials = []
    for name in preset.files:
        scenes = (SceneSpec("file", name, name="sim_val_1"),)
        trials += [Trial("rivals", name, who, by, scenes) for who, by in _others(preset)]
        trials.append(Trial("rivals", name, "shipped", (Network(),), scenes))
    return trials


def taught(preset: Preset) -> list[Trial]:
    """Return the trials of the shipped picker fine-tuned on two such files, and tested on a third."""
    trials = []
    for name in preset.files if preset.files_taught else ():
        lessons = tuple(SceneSpec("file", name, name=f"sim_train_{k}") for k in (1, 2))
        method = Network(lessons=lessons, epochs=preset.epochs, rate=preset.rate)
        scenes = (SceneSpec("file", name, name="sim_val_1"),)
        trials.append(Trial("rivals", name, "fine-tuned on 2", (method,), scenes))
    return trials


def labels(preset: Preset) -> list[Trial]:
    """Return the trials of Gaussian against binary labels, networks that start from nothing (figure 2)."""
    trials = []
    for name in preset.labels:
        scenes = _fields(preset, name, TEST, preset.tests)
        lessons = _fields(preset, name, LESSON, preset.label_lessons)
        for label in ("gaussian", "binary"):
            taught = Network("nothing", lessons, preset.label_epochs, 1e-3, preset.batch, label)
            trials.append(Trial("labels", name, f"{label} labels", (taught,), scenes))
        trials += [Trial("labels", name, who, by, scenes) for who, by in _others(preset)]
        trials.append(Trial("labels", name, "shipped", (Network(),), scenes))
    return trials


def tuning(preset: Preset) -> list[Trial]:
    """Return the trials of the shipped picker as it is and fine-tuned on some tomograms (figure 3)."""
    trials = []
    for name in preset.tuned:
        scenes = _fields(preset, name, TEST, preset.tests)
        trials.append(Trial("tuning", name, "shipped", (Network(),), scenes))
        for amount in preset.amounts:
            lessons = _fields(preset, name, LESSON, amount)
            taught = Network(lessons=lessons, epochs=preset.epochs, rate=preset.rate)
            trials.append(Trial("tuning", name, f"fine-tuned on {amount}", (taught,), scenes))
        trials += [Trial("tuning", name, who, by, scenes) for who, by in _others(preset)]
    return trials


def crowded(preset: Preset) -> list[Trial]:
    """Return the trials of rubisco in a shell (figure 6)."""
    return _in_shells(preset, "crowded", masked=False)


def mask(preset: Preset) -> list[Trial]:
    """Return the same within a mask of the shell's inside (figure 5)."""
    return _in_shells(preset, "mask", masked=True)


def hard(preset: Preset) -> list[Trial]:
    """Return the trials at lower signal-to-noise ratios, and in a crowded cell."""
    trials = []
    for name in preset.hard:
        cases = {
            f"SNR {snr:g}": _fields(preset, name, TEST, preset.tests, snr) for snr in (0.05, *preset.noise)
        }
        cases["cell"] = tuple(
            SceneSpec("cell", name, TEST + k, 0.03, preset.width) for k in range(preset.tests)
        )
        for case, scenes in cases.items():
            rows = [("shipped", (Network(),)), *_others(preset)]
            trials += [Trial("hard", f"{name}, {case}", who, by, scenes) for who, by in rows]
    return trials


EXPERIMENTS: dict[str, Callable[[Preset], list[Trial]]] = {
    "rivals": rivals,
    "taught": taught,
    "tuning": tuning,
    "crowded": crowded,
    "mask": mask,
    "hard": hard,
    "labels": labels,
}


def run_trial(trial: Trial, bench: Bench) -> dict[str, Any]:
    """Return a trial's row; candidates that are in the folder already are not looked for again."""
    truth, masks = {}, {}
    for spec in trial.scenes:
        scene = bench.scene(spec)
        truth[scene.tomogram.name] = scene.truth
        if trial.masked and scene.mask is not None:
            masks[scene.tomogram.name] = scene.mask
    group = _group(bench.data, trial.particle)
    rows = []
    for method in trial.methods:
        found = [_candidates(method, spec, bench) for spec in trial.scenes]
        cost = {name: sum(one[name] for _, one in found) for name in ("seconds", "cpu_seconds")}
        row = scored(
            {picks.tomogram: picks for picks, _ in found},
            truth,
            diameter=PARTICLES[trial.particle].diameter,
            mask=masks or None,
            group=group,
        )
        rows.append(
            row
            | {"method": asdict(method), "candidates": [_key(method, spec, bench) for spec in trial.scenes]}
            | {"unchanged": isinstance(method, Network) and method.unchanged(bench)}
            | cost
        )
    best = max(rows, key=lambda row: float(row["f1"]))
    named = {"experiment": trial.experiment, "case": trial.case, "who": trial.who, "particle": trial.particle}
    return named | best | {"scenes": [asdict(spec) for spec in trial.scenes]}


def specs_of(trials: list[Trial]) -> list[SceneSpec]:
    """Return every scene that trials learn from or are tested on, once."""
    wanted: dict[SceneSpec, None] = {}
    for trial in trials:
        wanted |= dict.fromkeys(trial.scenes)
        for method in trial.methods:
            if isinstance(method, Network):
                wanted |= dict.fromkeys(method.lessons)
    return list(wanted)


def candidates_at(bench: Bench, name: str) -> Picks:
    """Return the candidates of a scene that were kept under a name of a row."""
    return _load(bench.folder / "candidates" / f"{name}.npz")[0]


def _others(preset: Preset) -> list[tuple[str, tuple[Method, ...]]]:
    return [("matching", (Matching(preset.angle, preset.binning),)), ("Gaussians", gaussians())]


def _fields(preset: Preset, name: str, seed: int, count: int, snr: float = 0.05) -> tuple[SceneSpec, ...]:
    return tuple(SceneSpec("field", name, seed + k, snr, preset.width) for k in range(count))


def _in_shells(preset: Preset, experiment: str, *, masked: bool) -> list[Trial]:
    def shells(seed: int, count: int) -> tuple[SceneSpec, ...]:
        return tuple(
            SceneSpec("carboxysome", "rubisco", seed + k, 0.05, preset.enclosed) for k in range(count)
        )

    scenes = shells(TEST, max(1, preset.tests // 2))
    lessons = shells(LESSON, preset.enclosed_lessons)
    epochs, rate = preset.enclosed_epochs, preset.rate
    ours = {
        "shipped": Network(masked=masked),
        f"fine-tuned on {len(lessons)}": Network(lessons=lessons, epochs=epochs, rate=rate, masked=masked),
    }
    who: list[tuple[str, tuple[Method, ...]]] = [(name, (one,)) for name, one in ours.items()]
    return [Trial(experiment, "rubisco in a shell", *one, scenes, masked) for one in who + _others(preset)]


@cache
def _group(data: Path, particle: str) -> Array:
    template = PARTICLES[particle].template(data, 10.0)
    return point_group(template.density, template.centre)


def _key(method: Method, spec: SceneSpec, bench: Bench) -> str:
    asked: dict[str, Any] = {"method": asdict(method), "scene": asdict(spec)}
    if not isinstance(method, Matching):  # the working grid of the Gaussians is the picker's
        asked["picker"] = _fingerprint(bench.picker)
    return f"{type(method).__name__.lower()}_{spec.key}_{digest(asked)}"


@cache
def _fingerprint(picker: str) -> str:
    return load_picker(picker).fingerprint


def _candidates(method: Method, spec: SceneSpec, bench: Bench) -> tuple[Picks, dict[str, float]]:
    """Return the candidates of a scene and what they cost, from the folder where they are there."""
    key = _key(method, spec, bench)
    path = bench.folder / "candidates" / f"{key}.npz"
    if not path.exists():
        bench.tick()
        wall, cpu = time.perf_counter(), time.process_time()
        if isinstance(method, Network):
            found = method.candidates(bench, spec, key)
        else:
            found = method.candidates(bench, spec)
        cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        _save(path, found, cost)
    return _load(path)


def _save(path: Path, picks: Picks, cost: dict[str, float]) -> None:
    best = picks.take(np.argsort(-picks.score, kind="stable")[:MOST])
    arrays: dict[str, Any] = {"zyx": best.zyx, "score": best.score, "voxel_size": best.voxel_size}
    if best.rotations is not None:
        arrays["rotations"] = best.rotations
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part.npz")
    np.savez_compressed(temporary, name=picks.tomogram, cost=json.dumps(cost), **arrays)
    temporary.replace(path)


def _load(path: Path) -> tuple[Picks, dict[str, float]]:
    with np.load(path, allow_pickle=False) as file:
        cost: dict[str, float] = json.loads(str(file["cost"]))
        picks = Picks(
            file["zyx"],
            file["score"],
            file.get("rotations"),
            voxel_size=float(file["voxel_size"]),
            tomogram=str(file["name"]),
        )
    return picks, cost
