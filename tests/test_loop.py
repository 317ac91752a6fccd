from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.volumes import MemoryVolume, two_balls
from tomocpt_stream import loop
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Example, Sampling, draw_batch
from tomocpt_stream.errors import CheckpointError, SourceError
from tomocpt_stream.loop import Listener, Look, OnStep, Step, TimeOver, learn
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.picker import Picker, load_picker, picker_metadata
from tomocpt_stream.runs import Run
from tomocpt_stream.train_options import Precision, TrainOptions

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


def test_training_learns_one_crop(tmp_path: Path) -> None:
    options = replace(
        OPTIONS, steps=16, learning_rate=3e-3, average=0.0, batch_size=1, checkpoint_every=16, seed=3
    )
    still = two_balls()
    losses: list[float] = []
    picker = learn(
        [still], options=options, folder=tmp_path, listeners=[OnStep(lambda step: losses.append(step.loss))]
    )
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    voxels, label, _ = draw_batch([still], SAMPLING, size=1, seed=5, step=0)
    score = picker.score(voxels)
    assert score[label > 0.5].mean() > 5 * score[label == 0].mean()


class _Witness:
    """Keeps what it is told; stops a run after a step."""

    def __init__(self, stop: int = 0) -> None:
        self.steps: list[Step] = []
        self.looks: list[Look] = []
        self.stop = stop

    def step(self, step: Step) -> None:
        self.steps.append(step)
        if step.step == self.stop:
            raise KeyboardInterrupt

    def look(self, look: Look) -> None:
        self.looks.append(look)


@pytest.mark.parametrize("often", [False, True])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, often: bool
) -> None:
    options = replace(OPTIONS, schedule="plateau", patience=1)

    def run(folder: str, witness: _Witness) -> Picker:
        return learn(
            [two_balls(0), two_balls(1)],
            validation=[two_balls(2)],
            options=options,
            folder=tmp_path / folder,
            listeners=[witness],
        )

    if often:  # the state is kept within an epoch too, as after ten minutes
        monkeypatch.setattr(loop, "_STATE_EVERY", -1.0)
    whole, parts, rest, none = _Witness(), _Witness(stop=3), _Witness(), _Witness()
    unbroken = run("whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run("parts", parts)
    resumed = run("parts", rest)

    assert [step.step for step in parts.steps] == [1, 2, 3]
    # Where step 3 was not kept it is done again.
    assert [step.step for step in rest.steps] == ([4] if often else [3, 4])
    told = [(step.loss, step.validation, step.learning_rate) for step in whole.steps]
    assert [(step.loss, step.validation, step.learning_rate) for step in parts.steps] == told[:3]
    assert [(step.loss, step.validation, step.learning_rate) for step in rest.steps] == told[
        rest.steps[0].step - 1 :
    ]
    assert resumed.fingerprint == unbroken.fingerprint
    assert [step.validation is None for step in whole.steps] == [True, False, True, False]
    assert [step.epoch for step in whole.steps] == [1, 1, 2, 2]
    assert all(0 <= step.waited <= step.seconds for step in whole.steps)
    # A run that is finished is given back without a step.
    assert run("parts", none).fingerprint == unbroken.fingerprint
    assert not none.steps


@pytest.mark.parametrize("last", [2, 3])  # at a checkpoint, and between two
def test_a_run_that_was_ended_for_now_does_no_step_again(tmp_path: Path, last: int) -> None:
    def run(folder: str, *listeners: Listener) -> Picker:
        return learn(
            [two_balls(0)],
            validation=[two_balls(2)],
            options=OPTIONS,
            folder=tmp_path / folder,
            listeners=listeners,
        )

    def late(step: Step) -> None:
        if step.step == last:
            raise TimeOver

    first, rest = _Witness(), _Witness()
    with pytest.raises(TimeOver):
        run("parts", OnStep(late), first)
    parts = run("parts", rest)
    assert [step.step for step in first.steps] == list(range(1, last + 1))
    assert [step.step for step in rest.steps] == list(range(last + 1, 5))
    assert [len(one.looks) for one in (first, rest)] == [1, 1]
    assert parts.fingerprint == run("whole", _Witness()).fingerprint


def test_no_listener_misses_a_step_whose_state_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, rest = _Witness(), _Witness()

    def run(witness: _Witness) -> None:
        options = replace(OPTIONS, steps=2, checkpoint_every=1)
        learn(
            [two_balls(0)], validation=[two_balls(1)], options=options, folder=tmp_path, listeners=[witness]
        )

    def killed(self: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "keep_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run(first)
    run(rest)
    assert ([step.step for step in first.steps], len(first.looks)) == ([1], 1)
    assert ([step.step for step in rest.steps], len(rest.looks)) == ([1, 2], 2)
    assert rest.steps[0].validation == first.steps[0].validation


def test_gradients_that_are_no_numbers_reach_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(CheckpointError, match="norm of the gradients of nan at step 0"):
        learn([two_balls()], options=replace(OPTIONS, steps=1, checkpoint_every=1), folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_run_ends_when_the_validation_loss_no_longer_falls(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A rate that changes no weight: the second look is no lower than the first.
    options = replace(OPTIONS, steps=9, checkpoint_every=1, stop_after=1, learning_rate=1e-30, average=0.0)
    seen = _Witness()

    def run() -> Picker:
        return learn(
            [two_balls(0)], validation=[two_balls(1)], options=options, folder=tmp_path, listeners=[seen]
        )

    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        picker = run()
    assert [step.step for step in seen.steps] == [1, 2]
    assert picker.metadata["provenance"]["step"] == 1
    assert any(line.startswith("ended at step 2 of 9") for line in caplog.messages)
    assert any("of the time for crops" in line for line in caplog.messages)
    assert run().fingerprint == picker.fingerprint
    assert len(seen.steps) == 2


def test_a_listener_sees_a_particle_of_the_validation_at_each_checkpoint(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=2, average=0.0)
    seen = _Witness()
    learn([two_balls(0)], validation=[two_balls(2)], options=options, folder=tmp_path, listeners=[seen])
    (look,) = seen.looks
    assert (look.step, look.epoch, look.known) == (2, 1, None)
    assert look.label.max() > 0.5
    answered = load_picker(tmp_path / "last.safetensors").score(look.voxels[None])[0]
    np.testing.assert_allclose(look.answered, answered, atol=1e-5)


@pytest.mark.parametrize(("losses", "best"), [([0.1, 0.2], 0), ([0.1, 0.1], 0), ([0.2, 0.1], 1)])
def test_a_picker_that_training_makes_no_better_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    torch.manual_seed(1)
    good = Picker(build_network(TINY), picker_metadata(TINY, window=WINDOW, contrast="bright"))
    values = iter(losses)
    monkeypatch.setattr(loop._Held, "loss", lambda *_: next(values))
    seen = _Witness()
    kept = learn(
        [two_balls(1)],
        validation=[two_balls(2)],
        options=replace(OPTIONS, steps=1),
        folder=tmp_path,
        start_from=good,
        listeners=[seen],
    )
    assert (kept.fingerprint == good.fingerprint) == (best == 0)
    assert kept.metadata["provenance"]["step"] == best
    assert kept.metadata["provenance"]["validation_loss"] == min(losses)
    assert kept.contrast == "bright"
    assert [look.step for look in seen.looks] == [0, 1]
    assert load_picker(tmp_path / "last.safetensors").fingerprint != good.fingerprint


def test_best_and_last_pickers_carry_their_provenance(tmp_path: Path) -> None:
    picker = learn(
        [two_balls(0)],
        validation=[two_balls(1)],
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
        ".lock",
        "best.safetensors",
        "last.safetensors",
        "state.pt",
    ]


def test_without_validation_the_last_picker_is_returned(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1)
    picker = learn([two_balls(0)], options=options, folder=tmp_path)
    assert picker.metadata["provenance"]["step"] == 1
    assert not (tmp_path / "best.safetensors").exists()


def test_a_run_may_start_from_a_picker(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=1, learning_rate=1e-12, average=0.0)
    first = learn([two_balls(0)], options=options, folder=tmp_path / "first")
    second = learn(
        [two_balls(1)], options=replace(options, seed=9), folder=tmp_path / "second", start_from=first
    )
    voxels, _, _ = draw_batch([two_balls(0)], SAMPLING, size=1, seed=0, step=0)
    np.testing.assert_allclose(second.score(voxels), first.score(voxels), atol=1e-5)
    fresh = learn([two_balls(1)], options=replace(options, seed=9), folder=tmp_path / "fresh")
    assert not np.allclose(fresh.score(voxels), first.score(voxels), atol=1e-5)
    wide = Picker(
        build_network(TINY), first.metadata | {"label": {"kind": "gaussian", "widths": [0.99, 0.495]}}
    )
    taught = learn([two_balls(1)], options=options, folder=tmp_path / "wide", start_from=wide)
    assert taught.metadata["label"] == first.metadata["label"]  # of what it has learnt last
    kept = learn(
        [two_balls(1)],
        validation=[two_balls(2)],
        options=replace(options, learning_rate=1e-30),
        folder=tmp_path / "kept",
        start_from=wide,
    )
    assert kept.fingerprint == wide.fingerprint  # what has learnt nothing is itself, label and all
    other = replace(options, architecture=named_architecture("small"))
    with pytest.raises(CheckpointError, match="missing"):
        learn([two_balls(1)], options=other, folder=tmp_path / "other", start_from=first)


def test_examples_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    empty = Example(two_balls().volume, np.zeros((0, 3)))
    with pytest.raises(SourceError, match="without a particle"):
        learn([empty], options=OPTIONS, folder=tmp_path)
    broken = Example(
        MemoryVolume(np.full((40, 40, 80), np.nan, np.float32), (-1.0, 0.0, 1.0)), np.array([[20.0, 20, 20]])
    )
    with pytest.raises(CheckpointError, match="loss of nan at step 0"):
        learn([broken], options=OPTIONS, folder=tmp_path)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    precisions: list[Precision] = ["float32", "bfloat16"]
    for precision in precisions:
        options = replace(OPTIONS, steps=3, precision=precision)
        kept: list[Step] = []
        learn([two_balls()], options=options, folder=tmp_path / precision, listeners=[OnStep(kept.append)])
        losses[precision] = [step.loss for step in kept]
    assert losses["bfloat16"] != losses["float32"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)
