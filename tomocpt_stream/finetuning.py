"""Fine-tuning: a picker learns on from users' own tomograms, all of its weights and nothing frozen."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.crops import Sampling
from tomocpt_stream.epochs import Epochs, Split, split
from tomocpt_stream.errors import CheckpointError, SourceError
from tomocpt_stream.labelled import open_labelled
from tomocpt_stream.picker import Picker, load_picker
from tomocpt_stream.progress import Progress, silent
from tomocpt_stream.training import Precision, Step, TrainOptions, ignore, train
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from tomocpt_stream.labelled import LabelledTomogram

_LOGGER = logging.getLogger(__name__)
_VALIDATION_CROPS = 64
_WARM_UP = 50


def fine_tune(  # noqa: PLR0913  (a run is decided by what is asked here, and by nothing else)
    examples: Sequence[LabelledTomogram],
    *,
    picker: Picker | str | os.PathLike[str] = "base",
    folder: str | os.PathLike[str],
    epochs: int = 20,
    learning_rate: float = 5e-5,
    batch_size: int = 4,
    seed: int = 0,
    precision: Precision = "float32",
    augmentation: Augmentation | None = None,
    progress: Progress = silent,
    on_step: Callable[[Step], None] = ignore,
) -> Picker:
    """Return a picker that has learnt on from `picker` on labelled tomograms; the best by validation.

    An epoch is every crop with a particle once, and as many without. From five tomograms on a fifth of
    them is kept for validation, with fewer a slab of each; the log says which. Without augmentation given,
    crops are flipped and turned by 90° about the beam. `folder` keeps working volumes and checkpoints (one
    an epoch), and a run that was killed goes on there to the same picker. The rates rise over the first
    steps, a tenth of all and at most 50, and then fall as a cosine.

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
    place = Path(folder)
    opened = open_labelled(examples, parent)
    options = TrainOptions(
        architecture=parent.metadata["architecture"],
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
        seed=seed,
        sampling=Sampling(
            window=parent.window,
            radius=parent.particle_radius,
            label=parent.metadata["label"]["kind"],
            augmentation=Augmentation(turns=True) if augmentation is None else augmentation,
        ),
        validation_crops=_VALIDATION_CROPS,
        steps=epochs,  # the steps of an epoch are known when the volumes are
    )
    record: dict[str, Any] = {
        "parent": parent.fingerprint,
        "epochs": epochs,
        "examples": [one.fingerprint for one in opened],
        "groups": _numbered([one.group for one in opened]),
    }
    _claim(place, record | {"options": options.to_json()})
    prepared = [one.ingest(place / "volumes", progress=progress) for one in opened]
    parted = split(prepared, [one.group for one in opened], options.sampling, seed=seed)
    learnt = Epochs(parted.training, options.sampling, seed=seed)
    if not len(learnt):
        raise SourceError(
            f"{len(opened)} tomograms without a particle",
            expected="at least one tomogram with at least one particle",
            remedy="check the coordinate files",
        )
    held = _held(parted, options.sampling, seed)
    steps = learnt.steps(batch_size)
    options = replace(
        options,
        steps=epochs * steps,
        checkpoint_every=steps,
        warm_up=max(1, min(_WARM_UP, epochs * steps // 10)),
    )
    _say(parted, learnt, held, steps)
    names = {
        "tomograms": [one.tomogram.name for one in opened],
        "particles": sum(len(one.picks) for one in opened),
        "crops": {"positive": len(learnt.positive), "epoch": len(learnt), "validation": len(held or ())},
        "split": list(parted.remarks),
    }
    return train(
        learnt,
        validation=held or (),
        options=options,
        folder=place / "run",
        start=parent,
        provenance={"data": "fine-tuned on labelled tomograms", **record, **names}
        | {"parent_provenance": parent.metadata["provenance"]},
        on_step=on_step,
    )


def _held(parted: Split, sampling: Sampling, seed: int) -> Epochs | None:
    """Return the validation crops, unchanged by augmentation; None where there are none."""
    held = Epochs(parted.validation, replace(sampling, augmentation=Augmentation()), seed=seed)
    return held if len(held) else None


def _say(parted: Split, learnt: Epochs, held: Epochs | None, steps: int) -> None:
    for remark in parted.remarks:
        _LOGGER.info(remark)
    if held is None:
        _LOGGER.warning("no validation: the last weights are kept, not the best ones")
    _LOGGER.info(
        "%d crops with a particle and %d without: %d steps an epoch",
        len(learnt.positive),
        len(learnt) - len(learnt.positive),
        steps,
    )


def _numbered(groups: Sequence[str]) -> list[int]:
    """Return the groups as numbers, by which two runs part their tomograms in the same way."""
    return [groups.index(group) for group in groups]


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Write down what the run in `folder` is, or refuse a folder of another run."""
    path = folder / "run.json"
    wanted = json.loads(json.dumps(record))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(wanted, indent=1))
        return
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = {}
    if there != wanted:
        differing = [key for key in wanted if not isinstance(there, dict) or there.get(key) != wanted[key]]
        raise CheckpointError(
            f"{folder} holds a run that differs in {', '.join(differing) or 'more than is asked for'}",
            expected="an empty folder, or one of a run on the same examples with the same options",
            remedy="choose another folder",
        )
