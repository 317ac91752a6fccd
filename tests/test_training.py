from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Example, Sampling, draw_batch
from tomocpt_stream.errors import CheckpointError, PlanError, SourceError
from tomocpt_stream.network import named_architecture
from tomocpt_stream.picker import load_picker
from tomocpt_stream.targets import paint_box
from tomocpt_stream.training import (
    Precision,
    Step,
    TrainOptions,
    learning_rate,
    train,
)

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = Window((32, 32, 64), (4, 4, 8))
SAMPLING = Sampling(window=WINDOW, radius=6.0, positive=1.0)
TINY = named_architecture("small") | {"depths": [1, 1, 1, 1]}
OPTIONS = TrainOptions(
    architecture=TINY,
    steps=4,
    warm_up=1,
    average=0.9,
    sampling=SAMPLING,
    checkpoint_every=2,
    validation_crops=2,
)


@dataclass(frozen=True, eq=False)
class _Memory:
    array: npt.NDArray[np.float32]
    percentiles: tuple[float, float, float] = (-1.0, 0.0, 1.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.array.shape
        return (z, y, x)


def _example(seed: int = 0) -> Example:
    """Dark balls in weak noise."""
    rng = np.random.default_rng(seed)
    shape = (40, 48, 80)
    centres = np.array([[12.0, 12.0, 14.0], [26.0, 33.0, 30.0]]) + rng.uniform(-2, 2, (2, 3))
    box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    balls = paint_box(centres, box, radius=6.0, label="binary")
    return Example(_Memory(0.3 * rng.standard_normal(shape, dtype=np.float32) - 2 * balls), centres)


def test_learning_rate_rises_then_falls() -> None:
    options = replace(OPTIONS, steps=100, warm_up=10, learning_rate=1.0)
    rates = [learning_rate(options, step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[10] == 1.0
    assert rates[-1] < 0.012
    assert learning_rate(replace(options, schedule="constant"), 99) == 1.0


def test_training_learns_one_crop(tmp_path: Path) -> None:
    options = replace(
        OPTIONS, steps=16, learning_rate=3e-3, average=0.0, batch_size=1, checkpoint_every=16, seed=3
    )
    still = _example()
    losses: list[float] = []
    picker = train([still], options=options, folder=tmp_path, on_step=lambda step: losses.append(step.loss))
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    voxels, label, _ = draw_batch([still], SAMPLING, size=1, seed=5, step=0)
    score = picker.score(voxels)
    assert score[label > 0.5].mean() > 5 * score[label == 0].mean()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    examples, held = [_example(0), _example(1)], [_example(2)]
    whole: list[Step] = []
    unbroken = train(
        examples, validation=held, options=OPTIONS, folder=tmp_path / "whole", on_step=whole.append
    )

    parts: list[Step] = []

    def stop(step: Step) -> None:
        parts.append(step)
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(examples, validation=held, options=OPTIONS, folder=tmp_path / "parts", on_step=stop)
    resumed = train(
        examples, validation=held, options=OPTIONS, folder=tmp_path / "parts", on_step=parts.append
    )

    # Step 3 was not kept and is done again.
    assert [step.step for step in parts] == [1, 2, 3, 3, 4]
    assert [step.loss for step in parts if step.step != 3] == [step.loss for step in whole if step.step != 3]
    assert parts[2].loss == parts[3].loss == whole[2].loss
    assert resumed.fingerprint == unbroken.fingerprint
    assert [step.validation is None for step in whole] == [True, False, True, False]
    # A run that is finished is given back without a step.
    again = train(examples, validation=held, options=OPTIONS, folder=tmp_path / "parts", on_step=stop)
    assert again.fingerprint == unbroken.fingerprint


def test_best_and_last_pickers_carry_their_provenance(tmp_path: Path) -> None:
    picker = train(
        [_example(0)],
        validation=[_example(1)],
        options=OPTIONS,
        folder=tmp_path,
        provenance={"data": "balls"},
    )
    kept = picker.metadata["provenance"]
    assert kept["data"] == "balls"
    assert kept["options"] == OPTIONS.to_json()
    assert kept["validation_loss"] > 0
    assert picker.particle_radius == 6.0
    assert picker.window == WINDOW
    assert load_picker(tmp_path / "last.safetensors").metadata["provenance"]["step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "state.pt",
    ]


def test_without_validation_the_last_picker_is_returned(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1)
    picker = train([_example(0)], options=options, folder=tmp_path)
    assert picker.metadata["provenance"]["step"] == 1
    assert not (tmp_path / "best.safetensors").exists()


def test_a_run_may_start_from_a_picker(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1, learning_rate=1e-12, average=0.0)
    first = train([_example(0)], options=options, folder=tmp_path / "first")
    second = train([_example(1)], options=replace(options, seed=9), folder=tmp_path / "second", start=first)
    voxels, _, _ = draw_batch([_example(0)], SAMPLING, size=1, seed=0, step=0)
    np.testing.assert_allclose(second.score(voxels), first.score(voxels), atol=1e-5)
    fresh = train([_example(1)], options=replace(options, seed=9), folder=tmp_path / "fresh")
    assert not np.allclose(fresh.score(voxels), first.score(voxels), atol=1e-5)
    other = replace(options, architecture=named_architecture("small"))
    with pytest.raises(CheckpointError, match="missing"):
        train([_example(1)], options=other, folder=tmp_path / "other", start=first)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1)
    train([_example(0)], options=options, folder=tmp_path)
    with pytest.raises(CheckpointError, match="other options"):
        train([_example(0)], options=replace(options, seed=1), folder=tmp_path)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train([_example(0)], options=options, folder=tmp_path)


def test_options_and_examples_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="steps 0"):
        TrainOptions(steps=0)
    with pytest.raises(PlanError, match=r"average 1\.0"):
        TrainOptions(average=1.0)
    empty = Example(_example().volume, np.zeros((0, 3)))
    with pytest.raises(SourceError, match="without a particle"):
        train([empty], options=OPTIONS, folder=tmp_path)
    broken = Example(_Memory(np.full((40, 40, 80), np.nan, np.float32)), np.array([[20.0, 20, 20]]))
    with pytest.raises(CheckpointError, match="loss of nan at step 0"):
        train([broken], options=OPTIONS, folder=tmp_path)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    precisions: list[Precision] = ["float32", "bfloat16"]
    for precision in precisions:
        options = replace(OPTIONS, steps=3, precision=precision)
        kept: list[Step] = []
        train([_example()], options=options, folder=tmp_path / precision, on_step=kept.append)
        losses[precision] = [step.loss for step in kept]
    assert losses["bfloat16"] != losses["float32"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)
