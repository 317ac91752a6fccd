from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tomocpt_stream import curriculum
from tomocpt_stream.augmentation import Augmentation
from tomocpt_stream.blocks import Window
from tomocpt_stream.curriculum import Recipe, base_options, draw_hard, draw_phantom, prepare, train_base
from tomocpt_stream.errors import CheckpointError, PlanError, SourceError
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.phantom import PhantomOptions
from tomocpt_stream.picker import Picker, picker_metadata
from tomocpt_stream.runs import STATE, alone_in
from tomocpt_stream.shapes import SHAPES_HELD_OUT

if TYPE_CHECKING:
    from pathlib import Path

    from tomocpt_stream.crops import Example

SMALL = PhantomOptions(
    shape=(30, 48, 60),
    voxel_size=12.0,
    diameter=192.0,
    particles=("globule", "shell"),
    count=2,
    distractors=1,
    filaments=0,
    gold=0,
    vesicles=0,
    tilt_step=15.0,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every simulated tomogram a small one whose particles measure 16 voxels before ingest."""
    monkeypatch.setattr(curriculum, "draw_phantom", lambda seed: (SMALL, 9.6))


def test_drawn_phantoms_differ_and_stay_within_what_is_stated() -> None:
    drawn = [draw_phantom(seed) for seed in range(200)]
    assert draw_phantom(7) == drawn[7]
    options = [one for one, _ in drawn]
    across = [one.diameter / one.voxel_size for one in options]
    assert 12 <= min(across) <= 13
    assert 29 <= max(across) <= 30
    assert all(6 <= one.voxel_size <= 15 and 0.025 <= one.snr <= 0.2 for one in options)
    assert {one.ctf_correction for one in options} == {"none", "flip"}
    assert all(one.contrast == "dark" for one in options)
    # On the working grid a particle measures 20 voxels, give or take the 5 % that `pick` leaves alone.
    ratios = [one.diameter / target for one, target in drawn]
    assert 20 / 1.051 < min(ratios) < 19.5
    assert 20.5 < max(ratios) < 20 / 0.949
    assert sum(ratio == 20 for ratio in ratios) > 30


def test_no_held_out_shape_is_ever_drawn() -> None:
    kinds = {kind for seed in range(300) for kind in draw_phantom(seed)[0].particles}
    assert not kinds & set(SHAPES_HELD_OUT)
    assert len(kinds) > 500


def test_hard_phantoms_have_maps_crowds_and_larger_objects() -> None:
    maps = ("one.mrc", "two.mrc", "three.mrc", "four.mrc", "five.mrc")
    drawn = [draw_hard(seed, maps)[0] for seed in range(150)]
    assert draw_hard(7, maps)[0] == drawn[7]
    plain = [draw_phantom(seed)[0] for seed in range(150)]
    mapped = [one for one in drawn if set(one.particles) & set(maps)]
    assert 80 < len(mapped) < 120
    assert all(one.scale_maps for one in mapped)
    assert {kind for one in mapped for kind in one.particles if kind.endswith(".mrc")} == set(maps)
    assert 50 < sum(one.large > 0 for one in drawn) < 100
    assert 30 < sum(one.smoothing > 0 for one in drawn) < 70
    assert 30 < sum(one.ctf_correction == "wiener" for one in drawn) < 70
    crowded = sum(one.count > 1.4 * before.count for one, before in zip(drawn, plain, strict=True))
    assert 30 < crowded < 70


def test_a_map_is_learnt_from_or_kept_for_validation() -> None:
    with pytest.raises(PlanError, match=r"in both a\.mrc"):
        Recipe(maps=("x/a.mrc", "x/b.mrc"), held_maps=("y/a.mrc",))
    with pytest.raises(PlanError, match="for validation 0"):
        Recipe(maps=("x/a.mrc",))


@pytest.mark.usefixtures("small")
def test_a_tomogram_is_simulated_onto_the_working_grid(tmp_path: Path) -> None:
    curriculum._simulate(tmp_path, 3)
    (made,) = prepare(tmp_path, {3: ()})
    assert made.volume.shape == (38, 60, 75)
    truth = json.loads((tmp_path / "3.json").read_text())
    expected = (np.array(truth["zyx"]) + 0.5) * 192 / 16 / 9.6 - 0.5
    np.testing.assert_allclose(made.centres, expected)
    assert len(made.centres) == 2
    # Protein is dark where the truth says that a solid particle is.
    z, y, x = np.rint(made.centres[0]).astype(int)
    inside = made.volume.array[z - 3 : z + 4, y - 3 : y + 4, x - 3 : x + 4].mean()
    assert inside < made.volume.percentiles[1]


def test_a_field_without_room_is_thinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crowded = replace(SMALL, count=40)
    monkeypatch.setattr(curriculum, "draw_phantom", lambda seed: (crowded, 9.6))
    curriculum._simulate(tmp_path, 0)
    kept = json.loads((tmp_path / "0.json").read_text())
    assert 0 < len(kept["zyx"]) == kept["options"]["count"] < 40
    with pytest.raises(SourceError, match="no room"):
        curriculum._thinned(replace(SMALL, count=1))


@pytest.mark.usefixtures("small")
def test_tomograms_of_another_recipe_are_refused(tmp_path: Path) -> None:
    curriculum._simulate(tmp_path, 3)
    with pytest.raises(PlanError, match=r"a tomogram 3 drawn from no maps; expected .* from a\.mrc, b\.mrc"):
        prepare(tmp_path, {3: ("x/a.mrc", "x/b.mrc")})
    kept = json.loads((tmp_path / "3.json").read_text())
    kept["maps"] = ["a.mrc", "b.mrc"]
    (tmp_path / "3.json").write_text(json.dumps(kept))
    assert len(prepare(tmp_path, {3: ("x/a.mrc", "x/b.mrc")})) == 1
    with pytest.raises(PlanError, match=r"from a\.mrc, b\.mrc; expected one drawn from b\.mrc, a\.mrc"):
        prepare(tmp_path, {3: ("b.mrc", "a.mrc")})
    del kept["maps"]  # as folders were before they said so
    (tmp_path / "3.json").write_text(json.dumps(kept))
    assert len(prepare(tmp_path, {3: ("b.mrc",)})) == 1


def test_a_picker_of_other_windows_or_another_radius_is_no_beginning(tmp_path: Path) -> None:
    tiny = named_architecture("small") | {"depths": [1, 1, 1, 1]}
    for asked in ({"particle_radius": 9.0}, {"window": Window((64, 64, 64), (4, 4, 4))}):
        metadata = picker_metadata(tiny, **({"window": Window()} | asked))
        with pytest.raises(PlanError, match="expected 10 voxels in windows of"):
            train_base(tmp_path, start=Picker(build_network(tiny), metadata))
    other = Picker(build_network(tiny), picker_metadata(tiny, window=Window()))
    with pytest.raises(PlanError, match=r"has depths \[1, 1, 1, 1\]; expected .* depths \[2, 2, 2, 2\]"):
        train_base(tmp_path, start=other)
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_prepare_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(CheckpointError, match="another process trains in"):
        train_base(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("small")
def test_the_recipe_trains_and_tells_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An untrained network has thousands of peaks; calibration has a test of its own.
    calibrated: list[int] = []

    def keep(picker: Any, examples: list[Example], **_: Any) -> Any:
        calibrated.append(len(examples))
        return picker

    monkeypatch.setattr(curriculum, "calibrate", keep)
    folder = tmp_path / "tomograms"
    folder.mkdir()
    for seed in (5, 1_000_005):
        curriculum._simulate(folder, seed)
    base = base_options(steps=1)
    options = replace(
        base,
        architecture=named_architecture("small") | {"depths": [1, 1, 1, 1]},
        batch_size=1,
        validation_crops=1,
        sampling=replace(base.sampling, window=Window((32, 32, 64), (4, 4, 8))),
    )
    picker = train_base(tmp_path, recipe=Recipe(tomograms=1, validation=1, seed=5, options=options))
    kept = picker.metadata["provenance"]
    assert kept["data"] == "simulated tomograms"
    assert (kept["tomograms"], kept["particles"], kept["first_seed"]) == (1, 2, 5)
    assert kept["options"]["sampling"]["augmentation"]["turns"] is True
    assert base.sampling.augmentation != Augmentation()
    assert calibrated == [1]


def test_a_folder_of_other_phantoms_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [tmp_path / name for name in ("a.mrc", "b.mrc", "c.mrc")]
    for path in maps:
        path.write_text(path.name)
    one, held, other = map(str, maps)

    def reached(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(curriculum, "prepare", reached)
    recipe = Recipe(maps=(one,), held_maps=(held,))
    for _ in range(2):  # the same run may go on
        with pytest.raises(KeyboardInterrupt):
            train_base(tmp_path / "base", recipe=recipe)
    with pytest.raises(CheckpointError, match="tomograms holds a run that differs in maps"):
        train_base(tmp_path / "base", recipe=replace(recipe, maps=(other,)))
    (tmp_path / "base" / "run" / STATE).touch()
    with pytest.raises(
        CheckpointError, match=r"run holds a run that differs in tomograms 200 \(now 3\), seed"
    ):
        train_base(tmp_path / "base", recipe=replace(recipe, tomograms=3, seed=4))
    # The tomograms serve a run with other options too.
    (tmp_path / "base" / "run" / "run.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        train_base(tmp_path / "base", recipe=replace(recipe, options=base_options(steps=1)))


def test_tomograms_are_simulated_by_worker_processes(tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    made = prepare(tmp_path, {11: ()}, workers=1, progress=lambda *report: reports.append(report))
    assert reports == [("simulate", 1, 1)]
    assert made[0].volume.shape[0] >= 48
    assert len(made[0].centres) >= 4
