"""Training on users' own tomograms: a new picker from nothing, or one that learns on, nothing frozen."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.blocks import Window
from tomocpt_stream.calibration import calibrate as calibrated
from tomocpt_stream.crops import Sampling
from tomocpt_stream.diary import Diary
from tomocpt_stream.epochs import Epochs, Split, split
from tomocpt_stream.errors import PlanError, SourceError
from tomocpt_stream.labelled import open_labelled
from tomocpt_stream.loop import Listener, OnStep, learn
from tomocpt_stream.network import build_network, named_architecture, start_quiet
from tomocpt_stream.picker import Picker, load_picker, picker_metadata
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.ranks import check_devices
from tomocpt_stream.runs import STATE, alone_in, claim
from tomocpt_stream.targets import WIDTHS
from tomocpt_stream.train_options import Precision, Schedule, TrainOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from tomocpt_stream.labelled import LabelledTomogram, Opened
    from tomocpt_stream.loop import Step
    from tomocpt_stream.targets import Label

_LOGGER = logging.getLogger(__name__)
_VALIDATION_CROPS = 64
_WARM_UP = 50
# The network halves a window five times.
_MULTIPLE = 32


def train(  # noqa: PLR0913  (a run is decided by what is asked here, and by nothing else)
    examples: Sequence[LabelledTomogram],
    *,
    folder: str | os.PathLike[str],
    architecture: str | Mapping[str, Any] = "small",
    window: Window | None = None,
    label: Label = "gaussian",
    particle_radius: float = 10.0,
    epochs: int = 150,
    learning_rate: float = 4e-4,
    schedule: Schedule = "plateau",
    patience: int = 6,
    stop_after: int = 36,
    weight_decay: float = 1e-10,
    batch_size: int = 10,
    average: float = 0.0,
    precision: Precision = "float32",
    augmentation: Augmentation | None = None,
    seed: int = 0,
    validation: bool = True,
    calibrate: bool = True,
    devices: int = 1,
    progress: Progress = silent,
    on_step: Callable[[Step], None] | None = None,
) -> Picker:
    """Return a picker trained from nothing on labelled tomograms; the best by validation.

    Rates, decay, batch, epochs, `patience` and `stop_after` are the paper's (section 2): the rate is
    halved when the validation loss has not fallen for 6 epochs, and the run ends after 36. The rise over
    the first steps and the default augmentation are not. `architecture` is "small", "paper" or what
    `build_network` takes; `window` is 64 x 64 x 64 voxels with halos of 8 if not given. A particle has a
    radius of `particle_radius` working voxels. The picker knows protein as dark; bright tomograms are
    negated. The rest is as in `fine_tune`.
    """
    named = named_architecture(architecture) if isinstance(architecture, str) else dict(architecture)
    options = TrainOptions(
        architecture=named,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        patience=patience,
        stop_after=stop_after,
        weight_decay=weight_decay,
        average=average,
        precision=precision,
        seed=seed,
        sampling=Sampling(window or Window(), particle_radius, label, augmentation=_changes(augmentation)),
        validation_crops=_VALIDATION_CROPS,
        steps=epochs,  # the steps of an epoch are known when the volumes are
    )
    _refuse_unseen(options)
    record = {"data": "trained on labelled tomograms"}
    asked = _Asked(Path(folder), options, record, _untrained(options), validation, calibrate, devices)
    return _train(asked, examples, progress=progress, on_step=on_step)


def fine_tune(  # noqa: PLR0913  (a run is decided by what is asked here, and by nothing else)
    examples: Sequence[LabelledTomogram],
    *,
    picker: Picker | str | os.PathLike[str] = "base",
    folder: str | os.PathLike[str],
    epochs: int = 20,
    learning_rate: float = 5e-5,
    schedule: Schedule = "cosine",
    patience: int = 6,
    stop_after: int = 0,
    weight_decay: float = 1e-10,
    batch_size: int = 4,
    average: float = 0.0,
    precision: Precision = "float32",
    augmentation: Augmentation | None = None,
    seed: int = 0,
    validation: bool = True,
    calibrate: bool = True,
    devices: int = 1,
    progress: Progress = silent,
    on_step: Callable[[Step], None] | None = None,
) -> Picker:
    """Return a picker that has learnt on from `picker` on labelled tomograms; the best by validation.

    `picker` itself is among those to choose from: where no epoch has a lower validation loss, it is
    returned with its own weights, and the log says so.

    An epoch is every crop with a particle once, and as many without. From five groups of tomograms on a
    fifth of them is kept for validation, with fewer a slab of each; the log says which. Without
    augmentation given, crops are flipped and turned by 90° about the beam. `folder` keeps working volumes,
    checkpoints (one an epoch), curves and pictures; a run that was killed goes on there to the same picker.
    The rates rise over the first steps, a tenth of all and at most 50, and then fall as a cosine
    ("plateau": are halved after `patience` epochs without a lower validation loss). `stop_after` ends the
    run after so many such epochs; 0 does not. `average` is the decay of a running average of the weights, 0
    for none. `calibrate` shifts the scores so that 0.3 is the best threshold on the validation parts, if
    they have 10 particles. With `validation` False all particles are learnt from: a plateau becomes a
    cosine, the last weights are returned, and the scores stay as they are. `devices` GPUs (without any:
    processes) divide the crops of a step among them; that takes the package lightning.

    Raises
    ------
    SourceError, FormatError
        A tomogram or its truth cannot be used, or there is no particle in all of them.
    CheckpointError
        The folder holds a run on other examples, from another picker or with other options.
    PlanError
        A number that no run can have.
    """
    parent = picker if isinstance(picker, Picker) else load_picker(picker)
    label = parent.metadata["label"]
    first, second = label.get("widths", WIDTHS)
    options = TrainOptions(
        architecture=parent.metadata["architecture"],
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        patience=patience,
        stop_after=stop_after,
        weight_decay=weight_decay,
        average=average,
        precision=precision,
        seed=seed,
        sampling=Sampling(
            parent.window,
            parent.particle_radius,
            label["kind"],
            augmentation=_changes(augmentation),
            widths=(first, second),
        ),
        validation_crops=_VALIDATION_CROPS,
        steps=epochs,
    )
    record = {
        "data": "fine-tuned on labelled tomograms",
        "parent": parent.fingerprint,
        "parent_provenance": parent.metadata["provenance"],
    }
    asked = _Asked(Path(folder), options, record, parent, validation, calibrate, devices)
    tuned = _train(asked, examples, progress=progress, on_step=on_step)
    if tuned.fingerprint == parent.fingerprint:
        _LOGGER.warning("no epoch has a lower validation loss than the picker itself: its weights are kept")
    return tuned


@dataclass(frozen=True, eq=False)
class _Asked:
    """A run as it was asked for; the steps of its options are epochs."""

    folder: Path
    options: TrainOptions
    record: dict[str, Any]
    first: Picker
    """What tomograms are prepared for: the parent, or a picker that has learnt nothing."""
    validation: bool
    calibrate: bool
    devices: int

    @property
    def tuning(self) -> bool:
        """Whether `first` is a parent."""
        return "parent" in self.record


def _train(
    asked: _Asked,
    examples: Sequence[LabelledTomogram],
    *,
    progress: Progress,
    on_step: Callable[[Step], None] | None,
) -> Picker:
    """Prepare the tomograms, part them, learn, calibrate; no other process does so in the same folder."""
    check_devices(asked.devices)
    opened, epochs, seed = open_labelled(examples, asked.first), asked.options.steps, asked.options.seed
    with alone_in(asked.folder):
        record = {
            "epochs": epochs,
            "examples": [one.fingerprint for one in opened],
            "groups": _numbered([one.group for one in opened]),
        }
        # What is not asked for is not in the account, so that earlier runs stay what they were.
        record |= {} if asked.validation else {"validation": False}
        parent = {"parent": asked.record["parent"]} if asked.tuning else {}
        whole, begun = parent | record | {"options": asked.options.to_json()}, asked.folder / "run" / STATE
        claim(asked.folder, whole, begun=begun)
        scorer = asked.first if asked.tuning else None  # by its map a parent tells what was not labelled
        prepared = [one.ingest(asked.folder / "volumes", scorer=scorer, progress=progress) for one in opened]
        if asked.validation:
            parted = split(prepared, [one.group for one in opened], asked.options.sampling, seed=seed)
        else:
            parted = Split(prepared, [], ("validation: nothing, as asked: all particles are learnt from",))
        learnt = Epochs(parted.training, asked.options.sampling, seed=seed)
        if not len(learnt):
            raise SourceError(
                f"{len(opened)} tomograms without a particle",
                expected="at least one tomogram with at least one particle",
                remedy="check the coordinate files",
            )
        held = _held(parted, asked.options.sampling, seed)
        options = _stepped(asked.options, learnt, held)
        _say(parted, learnt, held, options)
        told: list[Listener] = [] if on_step is None else [OnStep(on_step)]
        with closing(Diary(asked.folder)) as diary:
            picker = learn(
                learnt,
                validation=held or (),
                options=options,
                folder=asked.folder / "run",
                start_from=asked.first if asked.tuning else None,
                provenance=asked.record | record | _names(opened, learnt, held, parted),
                devices=asked.devices,
                listeners=[diary, *told],
            )
        unchanged = asked.tuning and picker.fingerprint == asked.first.fingerprint
        if not asked.calibrate or held is None or unchanged:
            return picker
        return calibrated(picker, parted.validation, progress=progress)


def _refuse_unseen(options: TrainOptions) -> None:
    """Refuse what no network sees, before tomograms are put on a grid that is far too fine."""
    window, radius = options.sampling.window, options.sampling.radius
    if not 1 <= radius <= min(window.shape) / 4:
        raise PlanError(
            f"a particle radius of {radius:g} working voxels",
            expected=f"from 1 to {min(window.shape) / 4:g}, a quarter of the window of {window.shape} voxels",
            remedy="10 is the paper's; the diameter in Å is the tomogram's",
        )
    if any(length % _MULTIPLE for length in window.shape):
        raise PlanError(
            f"a window of {window.shape} voxels",
            expected=f"multiples of {_MULTIPLE}",
            remedy="change the window",
        )


def _changes(augmentation: Augmentation | None) -> Augmentation:
    return Augmentation(turns=True) if augmentation is None else augmentation


def _untrained(options: TrainOptions) -> Picker:
    """Return the picker that a run from nothing begins with."""
    torch.manual_seed(options.seed)
    network = build_network(options.architecture)
    start_quiet(network)
    sampling = options.sampling
    metadata = picker_metadata(
        options.architecture,
        window=sampling.window,
        particle_radius=sampling.radius,
        label={"kind": sampling.label, "widths": list(sampling.widths)},
    )
    return Picker(network, metadata)


def _stepped(options: TrainOptions, learnt: Epochs, held: Epochs | None) -> TrainOptions:
    """Return the options with their epochs as steps; without validation no look decides anything."""
    steps = learnt.steps(options.batch_size)
    schedule: Schedule = "cosine" if held is None and options.schedule == "plateau" else options.schedule
    return replace(
        options,
        steps=options.steps * steps,
        checkpoint_every=steps,
        warm_up=max(1, min(_WARM_UP, options.steps * steps // 10)),
        schedule=schedule,
        stop_after=options.stop_after if held else 0,
    )


def _held(parted: Split, sampling: Sampling, seed: int) -> Epochs | None:
    """Return the validation crops, unchanged by augmentation; None where there are none."""
    held = Epochs(parted.validation, replace(sampling, augmentation=Augmentation()), seed=seed)
    return held if len(held) else None


def _say(parted: Split, learnt: Epochs, held: Epochs | None, options: TrainOptions) -> None:
    for remark in parted.remarks:
        _LOGGER.info(remark)
    if held is None:
        _LOGGER.warning(
            "no validation: %s, the last weights are kept, not the best ones, and scores are not calibrated",
            "the rate falls by the step" if options.schedule == "cosine" else "the rate stays",
        )
    _LOGGER.info(
        "%d crops with a particle and %d without: %d steps an epoch",
        len(learnt.positive),
        len(learnt) - len(learnt.positive),
        options.checkpoint_every,
    )


def _names(opened: Sequence[Opened], learnt: Epochs, held: Epochs | None, parted: Split) -> dict[str, Any]:
    """Return what a person wants to know of the examples."""
    return {
        "tomograms": [one.tomogram.name for one in opened],
        "particles": sum(len(one.picks) for one in opened),
        "crops": {"positive": len(learnt.positive), "epoch": len(learnt), "validation": len(held or ())},
        "split": list(parted.remarks),
    }


def _numbered(groups: Sequence[str]) -> list[int]:
    """Return the groups as numbers, by which two runs part their tomograms in the same way."""
    return [groups.index(group) for group in groups]
