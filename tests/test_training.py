from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tomocpt_stream import loop, training
from tomocpt_stream.__main__ import main
from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.blocks import Window
from tomocpt_stream.diary import read_curves
from tomocpt_stream.epochs import Part
from tomocpt_stream.errors import CheckpointError, PlanError, SourceError
from tomocpt_stream.evaluation import match
from tomocpt_stream.formats import write_picks
from tomocpt_stream.heatmap import PickOptions
from tomocpt_stream.labelled import LabelledTomogram, Opened, open_labelled
from tomocpt_stream.network import build_network, named_architecture, start_quiet
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picker import Picker, load_picker, picker_metadata
from tomocpt_stream.picks import Picks
from tomocpt_stream.pipeline import pick
from tomocpt_stream.runs import STATE, alone_in
from tomocpt_stream.targets import WIDTHS, paint_box
from tomocpt_stream.tomogram import Tomogram, open_tomogram
from tomocpt_stream.training import fine_tune, train

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.crops import Example
    from tomocpt_stream.epochs import Epochs
    from tomocpt_stream.loop import Step
    from tomocpt_stream.train_options import TrainOptions

SHAPE = (24, 128, 44)
STILL = Augmentation()


def _parent(contrast: str = "dark") -> Picker:
    torch.manual_seed(0)
    architecture = named_architecture("small") | {"depths": [1, 1, 1, 1]}
    network = build_network(architecture)
    start_quiet(network)
    window = Window((32, 32, 64), (4, 4, 8))
    metadata = picker_metadata(architecture, window=window, particle_radius=5.0, contrast=contrast)
    return Picker(network, metadata)


def _phantom(seed: int = 0, name: str = "TS_1") -> LabelledTomogram:
    """Dark balls of 10 voxels in noise, one of them at a face."""
    rng = np.random.default_rng(seed)
    places = [(12, y, x) for y in range(8, 128, 16) for x in (0, 20, 38)]
    centres = np.array(places, dtype=np.float64) + rng.uniform(-2, 2, (len(places), 3))
    box = (slice(0, SHAPE[0]), slice(0, SHAPE[1]), slice(0, SHAPE[2]))
    balls = paint_box(centres, box, radius=5.0, label="binary")
    voxels = 0.3 * rng.standard_normal(SHAPE, dtype=np.float32) - 2 * balls
    picks = Picks(centres, np.ones(len(centres), np.float32), voxel_size=10.0, tomogram=name, shape=SHAPE)
    return LabelledTomogram(open_tomogram(voxels, voxel_size=10.0, name=name), picks, 100.0)


def _tune(folder: Path, items: list[LabelledTomogram] | None = None, **asked: Any) -> Picker:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "picker": _parent(), "augmentation": STILL}
    return fine_tune(items or [_phantom()], folder=folder, **(options | asked))


@pytest.mark.slow
def test_fine_tuning_learns_a_phantom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = _phantom()
    losses: list[float] = []

    def listen(step: Step) -> None:
        if step.validation is not None:
            losses.append(step.validation)

    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        tuned = _tune(tmp_path, [item], epochs=8, batch_size=1, learning_rate=1e-2, on_step=listen)
    assert len(losses) == 8
    assert min(losses) < 0.7 * losses[0]
    assert any("20% along y of TS_1" in line for line in caplog.messages)

    def f1(picker: Picker) -> float:
        assert not isinstance(item.tomogram, str)
        found = pick(item.tomogram, picker, PickOptions(diameter=100.0, threshold=0.3, contrast="dark"))  # type: ignore[arg-type]
        assert isinstance(item.picks, Picks)
        return match(found, item.picks, tolerance=50.0).f1

    assert f1(tuned) > f1(_parent()) + 0.15


def test_two_runs_are_equal_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    whole: list[Step] = []
    unbroken = _tune(tmp_path / "whole", batch_size=2, on_step=whole.append)
    seen: list[Step] = []

    def stop(step: Step) -> None:
        seen.append(step)
        if step.validation is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune(tmp_path / "killed", batch_size=2, on_step=stop)
    assert 0 < len(seen) < len(whole)
    resumed = _tune(tmp_path / "killed", batch_size=2, on_step=seen.append)
    assert [(step.step, step.loss, step.validation) for step in seen] == [
        (step.step, step.loss, step.validation) for step in whole
    ]
    assert resumed.fingerprint == unbroken.fingerprint
    # Each of them kept a diary, and the killed one has no step twice.
    one, other = (read_curves(tmp_path / name / "curves.csv") for name in ("whole", "killed"))
    assert list(one["step"]) == list(other["step"]) == [step.step for step in whole]
    np.testing.assert_array_equal(one["validation"], other["validation"])
    assert (tmp_path / "killed" / "looks" / "step_000000.png").exists()
    weights = [load_picker(tmp_path / name / "run" / "last.safetensors") for name in ("whole", "killed")]
    assert weights[0].fingerprint == weights[1].fingerprint


def test_the_picker_says_what_it_was_made_of(tmp_path: Path) -> None:
    parent = _parent("bright")
    tuned = _tune(tmp_path, [_phantom(k, f"TS_{k}") for k in range(2)], epochs=1, picker=parent)
    kept = tuned.metadata["provenance"]
    assert kept["parent"] == parent.fingerprint
    assert kept["tomograms"] == ["TS_0", "TS_1"]
    assert len(set(kept["examples"])) == 2
    assert kept["particles"] == 2 * 24
    assert kept["options"]["learning_rate"] == 5e-5
    assert len(kept["split"]) == 2
    # What the network is fed with stays what it was fed with.
    assert (tuned.contrast, tuned.particle_radius, tuned.window) == ("bright", 5.0, parent.window)
    # Nothing is frozen.
    before, after = (build_network(parent.metadata["architecture"]) for _ in range(2))
    parent.copy_weights(before)
    tuned.copy_weights(after)
    still = [
        name
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if torch.equal(one, other)
    ]
    assert not still


def test_a_parent_that_is_not_surpassed_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses = iter([0.1, 0.2])
    monkeypatch.setattr(loop._Held, "loss", lambda *_: next(losses))
    parent = _parent()
    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        kept = _tune(tmp_path, epochs=1, picker=parent)
    assert kept.fingerprint == parent.fingerprint
    assert "its weights are kept" in caplog.text
    assert "the picker as it is: validation loss 0.10000" in caplog.text


def test_a_picker_is_trained_from_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two tomograms, one of which is bright: the picker knows protein as dark and negates the other."""
    dark, bright = _phantom(0, "TS_0"), _phantom(0, "TS_1")
    assert isinstance(bright.tomogram, Tomogram)
    voxels = -bright.tomogram.read((slice(0, SHAPE[0]), slice(0, SHAPE[1]), slice(0, SHAPE[2])))
    turned = open_tomogram(voxels, voxel_size=10.0, name="TS_1")
    asked: dict[str, Any] = {
        "architecture": named_architecture("small") | {"depths": [1, 1, 1, 1]},
        "window": Window((32, 32, 64), (4, 4, 8)),
        "particle_radius": 5.0,
        "label": "binary",
        "epochs": 1,
        "augmentation": STILL,
        "precision": "bfloat16",
        "average": 0.5,
    }
    items = [dark, LabelledTomogram(turned, bright.picks, 100.0, "bright")]
    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        picker = train(items, folder=tmp_path, calibrate=False, **asked)
    volumes = [example.volume.array[:] for example in _examples(tmp_path, items, picker)]
    np.testing.assert_array_equal(volumes[0], -volumes[1])
    assert [example.negate for example in _examples(tmp_path, items, picker)] == [False, True]
    kept = picker.metadata["provenance"]
    assert kept["data"] == "trained on labelled tomograms"
    assert "parent" not in kept
    options = kept["options"]
    # The paper's, where nothing else was asked for.
    assert (options["learning_rate"], options["weight_decay"], options["batch_size"]) == (4e-4, 1e-10, 10)
    assert (options["schedule"], options["patience"], options["stop_after"]) == ("plateau", 6, 36)
    assert (options["precision"], options["average"]) == ("bfloat16", 0.5)
    assert picker.metadata["label"]["kind"] == "binary"
    assert (picker.contrast, picker.particle_radius, picker.window) == ("dark", 5.0, asked["window"])
    assert (options["steps"], options["checkpoint_every"]) == (kept["step"], kept["step"])
    # It is asked for again: nothing is trained, but it is to be calibrated, for which there is too little.
    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        again = train(items, folder=tmp_path, **asked)
    assert "calibration" not in kept
    remark = again.metadata["provenance"]["calibration"]["remark"]
    assert remark == "8 validation particles, fewer than 10"
    assert again.fingerprint == picker.fingerprint
    assert again.metadata["provenance"]["step"] == kept["step"]
    assert caplog.text.count("of the time for crops") == 1


def _examples(folder: Path, items: list[LabelledTomogram], picker: Picker) -> list[Example]:
    return [one.ingest(folder / "volumes") for one in open_labelled(items, picker)]


def _trained(folder: Path, **asked: Any) -> Picker:
    return train([_phantom()], folder=folder, architecture=_parent().metadata["architecture"], **asked)


@pytest.mark.parametrize("tuning", [True, False])
def test_a_parent_says_what_was_not_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, tuning: bool
) -> None:
    scorers: list[Any] = []

    def ingest(self: Opened, folder: Path, *, scorer: Any, progress: Any) -> Example:
        scorers.append(scorer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Opened, "ingest", ingest)
    parent = _parent()
    run = partial(_tune, picker=parent) if tuning else _trained
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert scorers == [parent if tuning else None]


def test_a_parent_is_taught_the_label_that_it_was_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of an imported picker is wider than ours; a run with ours is what it was before."""
    asked: list[TrainOptions] = []

    def learn(learnt: Epochs, *, options: TrainOptions, **_: Any) -> Picker:
        asked.append(options)
        return _parent()

    monkeypatch.setattr(training, "learn", learn)
    ours = _parent()
    theirs = Picker(
        build_network(ours.metadata["architecture"]),
        ours.metadata | {"label": {"kind": "gaussian", "widths": [0.99, 0.495]}},
    )
    for name, parent in (("theirs", theirs), ("ours", ours)):
        _tune(tmp_path / name, picker=parent, calibrate=False)
    assert [one.sampling.widths for one in asked] == [(0.99, 0.495), WIDTHS]
    assert [one.to_json()["sampling"].get("widths") for one in asked] == [[0.99, 0.495], None]


def test_without_validation_no_look_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picks = Picks(np.array([[12.0, 20.0, 20.0]]), np.ones(1, np.float32), voxel_size=10.0, shape=SHAPE)
    item = LabelledTomogram(_phantom().tomogram, picks, 100.0)
    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        tuned = _tune(tmp_path, [item], epochs=1, schedule="plateau", stop_after=3)
    last = load_picker(tmp_path / "run" / "last.safetensors")
    assert tuned.fingerprint == last.fingerprint != _parent().fingerprint
    options = tuned.metadata["provenance"]["options"]
    assert (options["schedule"], options["stop_after"]) == ("cosine", 0)
    assert "no validation" in caplog.text


@pytest.mark.parametrize("tuning", [True, False])
def test_all_particles_are_learnt_from_where_none_is_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, tuning: bool
) -> None:
    given: dict[str, Any] = {}

    def learn(learnt: Epochs, **settings: Any) -> Picker:
        given.update(settings, learnt=learnt)
        return _parent()

    monkeypatch.setattr(training, "learn", learn)
    run = partial(_tune, picker=_parent("bright")) if tuning else _trained
    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        made = run(tmp_path, validation=False)
    assert [len(item.centres) for item in given["learnt"].examples] == [24]
    assert not isinstance(given["learnt"].examples[0].volume, Part)
    assert (len(given["validation"]), given["options"].schedule, given["options"].stop_after) == (
        0,
        "cosine",
        0,
    )
    assert given["provenance"]["validation"] is False
    # Its scores are those of its last weights.
    assert made.fingerprint == _parent().fingerprint
    assert "validation: nothing, as asked" in caplog.text
    assert "last weights are kept" in caplog.text
    _has_begun(tmp_path)
    with pytest.raises(CheckpointError, match="differs in validation"):
        run(tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    for epochs in (3, 2):  # which has learnt nothing yet
        with pytest.raises(KeyboardInterrupt):
            _tune(tmp_path, epochs=epochs, progress=_interrupt)
    _has_begun(tmp_path)
    with pytest.raises(CheckpointError, match="differs in examples"):
        _tune(tmp_path, [_phantom(5)])
    with pytest.raises(CheckpointError, match=r"differs in epochs 2 \(now 3\);"):
        _tune(tmp_path, epochs=3)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="choose another folder"):
        _tune(tmp_path)


def test_a_mistake_in_a_row_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        _tune(tmp_path / "folder", [LabelledTomogram(tmp_path / "none.mrc", tmp_path / "none.star", 100.0)])
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_prepare_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(CheckpointError, match="another process trains in"):
        _tune(tmp_path)
    assert not (tmp_path / "run.json").exists()


def _has_begun(folder: Path) -> None:
    """Make a folder look as if its run had learnt something."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / STATE).touch()


def _interrupt(*report: object) -> None:
    raise KeyboardInterrupt


def test_what_no_run_can_have_is_refused(tmp_path: Path) -> None:
    item = _phantom()
    assert not isinstance(item.tomogram, str)
    bare = LabelledTomogram(item.tomogram, Picks(np.zeros((0, 3)), np.zeros(0, np.float32)), 100.0)
    with pytest.raises(SourceError, match="1 tomograms without a particle"):
        _tune(tmp_path, [bare])
    with pytest.raises(PlanError, match="learning_rate 0"):
        _tune(tmp_path / "slow", learning_rate=0)
    with pytest.raises(PlanError, match="steps 0"):
        _tune(tmp_path / "none", epochs=0)
    unseen: dict[str, dict[str, Any]] = {
        "radius of 100 working voxels": {"particle_radius": 100.0},
        "radius of nan": {"particle_radius": float("nan")},
        "window of .48": {"window": Window((48, 64, 64), (8, 8, 8))},
    }
    for message, asked in unseen.items():
        with pytest.raises(PlanError, match=message):
            _trained(tmp_path / "none", **asked)
    assert not (tmp_path / "none").exists()


def test_the_command_takes_a_table(tmp_path: Path) -> None:
    item = _phantom()
    assert isinstance(item.picks, Picks)
    box = (slice(0, SHAPE[0]), slice(0, SHAPE[1]), slice(0, SHAPE[2]))
    write_mrc(tmp_path / "TS_1.mrc", item.tomogram.read(box), 10.0)  # type: ignore[union-attr]
    write_picks(item.picks, tmp_path / "TS_1.star")
    table = tmp_path / "table.csv"
    table.write_text("tomogram,picks,diameter\nTS_1.mrc,TS_1.star,100\n")
    _parent().save(tmp_path / "parent.safetensors")

    def asked(output: str) -> list[str]:
        words = ["finetune", table, "--folder", tmp_path / "runs", "--output", tmp_path / output]
        words += ["--picker", tmp_path / "parent.safetensors", "--epochs", 1]
        return [str(word) for word in words]

    done = CliRunner().invoke(main, asked("mine.safetensors"))
    assert done.exit_code == 0, done.output
    assert "20% along y of TS_1" in done.output
    assert "validation 0." in done.output
    tuned = load_picker(tmp_path / "mine.safetensors")
    assert tuned.metadata["provenance"]["parent"] == _parent().fingerprint
    for output, message in {"parent.safetensors": "parent.safetensors", "mine.txt": ".safetensors"}.items():
        refused = CliRunner().invoke(main, asked(output))
        assert refused.exit_code == 1
        assert message in refused.output
    assert load_picker(tmp_path / "parent.safetensors").fingerprint == _parent().fingerprint
    json.loads((tmp_path / "runs" / "run.json").read_text())
