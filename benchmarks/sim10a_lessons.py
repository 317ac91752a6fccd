"""Fine-tuning of the look-alikes' benchmark: what is asked for, what it has to learn from, what it costs."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from paper_methods import digest

from tomocpt_stream import LabelledTomogram, Picker, fine_tune, load_picker
from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.crops import Sampling
from tomocpt_stream.epochs import Epochs, Split, split
from tomocpt_stream.labelled import open_labelled
from tomocpt_stream.network import build_network

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sim10a_scenes import Kind, Scene

    from tomocpt_stream.train_options import Precision


@dataclass(frozen=True)
class Lesson:
    """How a class is learnt; equal lessons give equal pickers.

    epochs : passes over the crops; `steps`, where not 0, asks for so many of them instead, rounded up to
        whole epochs. radius : of the particle, working voxels; None leaves the picker's own. others : the
        other classes lie in half of the crops without a particle. validate : a slab of each tomogram is
        kept to choose the best epoch by; else all of them is learnt from and the last epoch taken.
        precision, average : as `fine_tune` has them. augment : fields of `Augmentation` beside the flips
        and quarter turns, which are always done. more : tomograms made here to learn from, beside the two.
    """

    kind: str
    picker: str
    epochs: int = 20
    steps: int = 0
    batch: int = 4
    rate: float = 5e-5
    radius: float | None = None
    others: bool = False
    validate: bool = False
    precision: Precision = "float32"
    average: float = 0.0
    seed: int = 0
    augment: tuple[tuple[str, float], ...] = ()
    more: int = 0

    @property
    def name(self) -> str:
        """What tells it from other lessons of the same class, for a legend."""
        words = [f"{self.steps} steps" if self.steps else f"{self.epochs} epochs"]
        words += [f"{self.more} more tomograms"] if self.more else []
        words += [f"radius {self.radius:g}"] if self.radius else []
        words += ["others"] if self.others else []
        words += ["validated"] if self.validate else []
        words += [self.precision] if self.precision != Lesson.precision else []
        words += [f"average {self.average:g}"] if self.average else []
        words += [f"rate {self.rate:g}"] if self.rate != Lesson.rate else []
        words += [f"batch {self.batch}"] if self.batch != Lesson.batch else []
        words += [f"seed {self.seed}"] if self.seed else []
        words += [f"{field} {value:g}" for field, value in self.augment]
        return ", ".join(words) + f" ({self.picker[:6]})"

    @property
    def key(self) -> str:
        """A name for its files."""
        said = asdict(self)
        if not self.more:  # left out, so that earlier lessons stay what they were
            del said["more"]
        return f"{self.kind}_{digest(said)}"

    def augmentation(self) -> Augmentation:
        """Return the changes of its crops."""
        return Augmentation(turns=True, **dict(self.augment))  # type: ignore[arg-type]  # checked there


@dataclass(frozen=True)
class Survey:
    """What there is to learn from: particles in the tomograms, in the parts that are learnt and kept back.

    `crops` are those of an epoch, `steps` its steps; a crop may have a particle of a neighbouring one's.
    """

    particles: int
    learnt: int
    kept: int
    crops: int
    steps: int
    voxel_size: float
    remarks: tuple[str, ...]


def with_radius(picker: Picker, radius: float | None) -> Picker:
    """Return a picker of the same weights for which a particle has another radius (working voxels)."""
    if radius is None or radius == picker.particle_radius:
        return picker
    network = build_network(picker.metadata["architecture"])
    picker.copy_weights(network)
    return Picker(network, picker.metadata | {"particle_radius": radius}, device=str(picker.device))


def examples_of(scenes: Sequence[Scene], kind: Kind, *, others: bool) -> list[LabelledTomogram]:
    """Return scenes as they are learnt from."""
    return [
        LabelledTomogram(
            scene.tomogram,
            scene.truth[kind.name],
            kind.diameter,
            contrast="dark",
            particle=kind.name,
            others=scene.others(kind.name) if others else None,
        )
        for scene in scenes
    ]


def survey(examples: Sequence[LabelledTomogram], picker: Picker, lesson: Lesson, folder: Path) -> Survey:
    """Return what fine-tuning would learn from, in the way it parts tomograms; volumes go into `folder`."""
    opened = open_labelled(examples, picker)
    prepared = [one.ingest(folder) for one in opened]
    sampling = Sampling(picker.window, picker.particle_radius, picker.metadata["label"]["kind"])
    whole = Split(prepared, [], ("validation: none, all particles are learnt from",))
    groups = [one.group for one in opened]
    parted = split(prepared, groups, sampling, seed=lesson.seed) if lesson.validate else whole
    epochs = Epochs(parted.training, sampling, seed=lesson.seed)
    particles, learnt, kept = (
        sum(len(one.centres) for one in some) for some in (prepared, parted.training, parted.validation)
    )
    return Survey(
        particles,
        learnt,
        kept,
        len(epochs),
        epochs.steps(lesson.batch),
        opened[0].grid.voxel_size,
        parted.remarks,
    )


def teach(
    lesson: Lesson,
    scenes: Sequence[Scene],
    kind: Kind,
    *,
    parent: Picker,
    folder: Path,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Picker, dict[str, Any]]:
    """Return the fine-tuned picker and its account; what was begun in `folder` goes on.

    The account has the survey, the steps, and the core seconds of a step as measured in the part of the
    run that was done last. `tick` is called after each step.
    """
    place = folder / lesson.key
    done, account = place / "picker.safetensors", place / "account.json"
    if done.exists() and account.exists():
        kept: dict[str, Any] = json.loads(account.read_text())
        return load_picker(done), kept
    start = with_radius(parent, lesson.radius)
    examples = examples_of(scenes, kind, others=lesson.others)
    seen = survey(examples, start, lesson, place / "volumes")
    epochs = max(1, math.ceil(lesson.steps / seen.steps)) if lesson.steps else lesson.epochs
    watch = _Watch(tick)
    picker = fine_tune(
        examples,
        picker=start,
        folder=place,
        epochs=epochs,
        learning_rate=lesson.rate,
        batch_size=lesson.batch,
        augmentation=lesson.augmentation(),
        validation=lesson.validate,
        precision=lesson.precision,
        average=lesson.average,
        seed=lesson.seed,
        on_step=lambda step: watch.note(step.step, step.steps, step.loss, step.validation),
    )
    record = asdict(seen) | {"epochs": epochs, "steps_in_all": epochs * seen.steps}
    record |= {"step_core_seconds": watch.core_seconds, "validation": watch.validation}
    picker.save(done)
    temporary = account.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(account)
    return picker, record


def waited(folder: Path) -> float | None:
    """Return the share of a run's time in which its network had no crops, by its curves; None without."""
    path = folder / "curves.csv"
    if not path.exists():
        return None
    curves = pd.read_csv(path)
    return float(curves["waited"].sum() / curves["seconds"].sum())


class _Watch:
    """Prints steps, and measures their core seconds from the second one on: the first one warms up."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self.validation: list[tuple[int, float]] = []

    def note(self, step: int, steps: int, loss: float, validation: float | None) -> None:
        now = (step, time.process_time())
        self._first, self._last = self._first or now, now
        if validation is not None:
            self.validation.append((step, validation))
        if step % 10 == 0 or step == steps:
            print(f"    step {step} of {steps}: loss {loss:.3f}", flush=True)
        self._tick()

    @property
    def core_seconds(self) -> float | None:
        """Core seconds of a step, validation included; None before there are two."""
        if self._first is None or self._first[0] == self._last[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
