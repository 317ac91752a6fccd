from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import bench_paper
import numpy as np
import numpy.typing as npt
import paper_experiments
import paper_methods
import pytest
from paper_experiments import EXPERIMENTS, FULL, SMALL, Trial, run_trial
from paper_methods import Bench, Gaussians, Matching, Network, acquaintance, binned
from paper_page import Pages, sweep_table
from paper_scenes import SceneSpec
from paper_scores import scored
from template_matching import Matched

from tomocpt_stream import Picker, Picks, Window, load_picker
from tomocpt_stream.mask import inside
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picker import picker_metadata
from tomocpt_stream.shapes import solid_template

if TYPE_CHECKING:
    from pathlib import Path

FIELD = SceneSpec("field", "apo-ferritin", 1, 0.3, 4.0)
TRUTH = np.array([[10.0, 10, 10], [10, 10, 40], [10, 40, 10], [10, 40, 40]])


def picks(points: object, scores: object, name: str = "a", **more: object) -> Picks:
    where = np.asarray(points, dtype=float).reshape(-1, 3)
    return Picks(where, np.asarray(scores, dtype=np.float32), voxel_size=10.0, tomogram=name, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Stand-ins of the density maps, in a folder of their own."""
    data = tmp_path_factory.mktemp("data")
    for name in (
        "maps_10A/6pxm",
        "maps_5A/1bxn",
        "maps_5A/2cg9",
        "maps_5A/3cf3",
        "maps_5A/1u6g",
        "maps_5A/3j9i",
    ):
        solid = solid_template("horseshoe", 125.0, 10.0)
        (data / name).parent.mkdir(exist_ok=True)
        write_mrc(data / f"{name}.mrc", solid.density, solid.pitch)
    return Bench(data, tmp_path_factory.mktemp("work"))


def test_everybody_is_scored_at_the_best_threshold() -> None:
    found = picks([*np.add(TRUTH, [0, 0, 1]), [10, 25, 25], [30, 25, 25]], [0.9, 0.8, 0.7, 0.6, 0.2, 0.1])
    row = scored({"a": found}, {"a": picks(TRUTH, np.ones(4))}, diameter=100.0)
    assert (row["f1"], row["picks"], row["truth"]) == (1.0, 4, 4)
    assert 0.2 <= row["threshold"] < 0.6
    assert row["median_distance"] == pytest.approx(0.1)  # 10 Å of 100 Å
    assert row["rotation_error"] is None
    assert row["shipped"]["f1"] == 1.0


def test_tomograms_share_one_threshold_and_pairs_are_one_to_one() -> None:
    twice = picks([*TRUTH, *np.add(TRUTH, [0, 2, 0])], [0.9] * 4 + [0.8] * 4, "a")
    none = picks(np.zeros((0, 3)), [], "b")
    row = scored(
        {"a": twice, "b": none},
        {"a": picks(TRUTH, np.ones(4), "a"), "b": picks(TRUTH, np.ones(4), "b")},
        diameter=100.0,
    )
    assert row["f1"] == pytest.approx(2 * 4 / (4 + 8))
    assert row["f1_of_tomograms"] == [1.0, 0.0]


def test_a_mask_confines_both_sides() -> None:
    allowed = np.zeros((20, 50, 50), dtype=np.int8)
    allowed[:, :25] = 1
    found = picks(TRUTH, np.ones(4), shape=(20, 50, 50))
    row = scored(
        {"a": found},
        {"a": found.take(np.arange(3))},
        diameter=100.0,
        mask={"a": allowed},
    )
    assert (row["truth"], row["picks"], row["f1"]) == (2, 2, 1.0)


def test_rotations_are_compared_within_the_point_group() -> None:
    half = np.diag([-1.0, -1.0, 1.0])
    true = picks(TRUTH, np.ones(4), rotations=np.repeat(np.eye(3)[None], 4, 0))
    found = picks(TRUTH, np.ones(4), rotations=np.repeat(half[None], 4, 0))
    for group, degrees in ((np.eye(3)[None], 180.0), (np.array([np.eye(3), half]), 0.0)):
        row = scored({"a": found}, {"a": true}, diameter=100.0, group=group)
        assert row["rotation_error"] == pytest.approx(degrees)


def test_binning_takes_means_and_cuts_what_is_left() -> None:
    volume = np.arange(5 * 4 * 4, dtype=np.float32).reshape(5, 4, 4)
    means = binned(volume, 2)
    assert means.shape == (2, 2, 2)
    assert means[0, 0, 0] == volume[:2, :2, :2].mean()
    assert np.array_equal(binned(volume, 1), volume)


def test_a_binned_match_comes_back_to_the_voxels_of_the_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_peak(volume: npt.NDArray[np.float32], *more: object, **_: object) -> Matched:
        z, y, x = np.indices(volume.shape)
        scores = np.exp(-((z - 5) ** 2 + (y - 6) ** 2 + (x - 7) ** 2) / 4).astype(np.float32)
        turned = np.array([np.eye(3), np.diag([-1.0, -1.0, 1.0])])
        return Matched(scores, (scores > 0.9).astype(np.int32), turned)

    monkeypatch.setattr(paper_methods, "match_template", one_peak)
    found = Matching(90.0, 2).candidates(bench, FIELD)
    # Binned voxel 5 is the mean of voxels 10 and 11.
    assert found.zyx[0] == pytest.approx([10.5, 12.5, 14.5], abs=1e-3)
    assert found.voxel_size == 10
    assert found.rotations is not None
    assert np.array_equal(found.rotations[0], np.diag([-1, -1, 1]))


def test_candidates_are_looked_for_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("rivals", "apo-ferritin", "Gaussians", (Gaussians(3.5), Gaussians(5.5)), (FIELD,))
    first = run_trial(trial, bench)

    def never(*_: object) -> Picks:
        raise AssertionError

    monkeypatch.setattr(Gaussians, "candidates", never)
    assert json.dumps(run_trial(trial, bench)) == json.dumps(first)
    with pytest.raises(AssertionError):
        run_trial(replace(trial, methods=(Gaussians(4.5),)), bench)


def test_a_network_learns_from_nothing_and_its_map_is_kept(bench: Bench) -> None:
    architecture = named_architecture("small")
    window = Window((64, 32, 32), (8, 4, 4))
    quick = Picker(
        build_network(architecture), picker_metadata(architecture, window=window, particle_radius=4.0)
    )
    quick.save(bench.folder / "quick.safetensors")
    bench = replace(bench, picker=str(bench.folder / "quick.safetensors"))
    method = Network("nothing", (FIELD,), 1, 1e-3, 1, "binary")
    row = run_trial(
        Trial("labels", "apo-ferritin", "binary labels", (method,), (replace(FIELD, seed=2),)), bench
    )
    assert (bench.folder / "maps" / f"{row['candidates'][0]}.zarr").is_dir()
    rows = [row, row | {"who": "gaussian labels"}]
    rows += [
        row | {"experiment": name, "unchanged": name == "mask"} for name in ("tuning", "crowded", "mask")
    ]
    page = Pages(bench, bench.folder / "page").write(rows, ["# Head"])
    text = page.read_text()
    assert "Threshold sweep" in text
    assert text.count("binary labels (unchanged)") == 1
    assert "it is the shipped picker" in text
    assert all(f"{row[name]:.3f}" in text for name in ("f1", "threshold"))
    for name in ("labels", "tuning", "thresholds", "crowded", "mask"):
        assert (page.parent / f"{name}.png").stat().st_size > 5000


def test_a_carboxysome_is_full_inside_and_its_mask_says_where_that_is(bench: Bench) -> None:
    scene = bench.scene(SceneSpec("carboxysome", "rubisco", 3, 0.1, 6.0))
    assert len(scene.truth) > 10
    assert scene.mask is not None
    assert inside(scene.truth, str(scene.mask)).all()
    gaps = np.linalg.norm(scene.truth.zyx[:, None] - scene.truth.zyx[None], axis=-1)
    assert gaps[gaps > 0].min() >= 9  # 0.75 diameters


def test_the_sweep_table_says_what_is_left_above_each_threshold() -> None:
    found = picks([*TRUTH, [10, 25, 25]], [0.95, 0.55, 0.5, 0.35, 0.15])
    row = scored({"a": found}, {"a": picks(TRUTH, np.ones(4))}, diameter=100.0)
    lines = sweep_table([row | {"case": "x", "who": "y", "method": {"start": "shipped"}}])
    cells = lines[2].strip("| ").split(" | ")[2:]
    assert cells[0] == "0.80 / 1.00 / 0.89"  # above 0.1
    assert cells[1] == cells[2] == "1.00 / 1.00 / 1.00"
    assert cells[4] == "1.00 / 0.50 / 0.67"  # strictly above 0.5
    assert cells[8] == "1.00 / 0.25 / 0.40"


def test_a_lesson_that_helped_nothing_leaves_the_shipped_picker(bench: Bench) -> None:
    shipped = load_picker("base")
    own = replace(bench, picker=str(bench.folder / "own.safetensors"))
    shipped.save(own.picker)

    class Taught(Network):
        def picker(self, bench: Bench) -> Picker:
            return shipped.shifted(1.0) if self.epochs else shipped

    assert not Network().unchanged(own)
    assert not Network("nothing", (FIELD,)).unchanged(own)
    assert Taught("shipped", (FIELD,)).unchanged(own)
    for _ in range(2):  # and that is known without the lesson the second time
        assert not Taught("shipped", (FIELD,), 1).unchanged(own)


def test_a_page_says_which_maps_its_picker_knows() -> None:
    picker = load_picker("base")
    maps = {"beta-galactosidase": "maps_10A/1f4a", "rubisco": "maps_5A/1bxn", "proteasome": "maps_5A/3j9i"}
    assert acquaintance(picker, maps) == (
        "- of the particles here the picker has learnt from the maps of proteasome; it was chosen and "
        "calibrated by beta-galactosidase"
    )
    taught = {"parent": picker.fingerprint, "parent_provenance": picker.metadata["provenance"]}
    child = Picker(build_network(picker.metadata["architecture"]), picker.metadata | {"provenance": taught})
    assert acquaintance(child, maps) == acquaintance(picker, maps)


@pytest.mark.parametrize("preset", [SMALL, FULL])
def test_no_trial_is_tested_on_its_lessons(preset: paper_experiments.Preset) -> None:
    trials = [trial for make in EXPERIMENTS.values() for trial in make(preset)]
    assert {trial.experiment for trial in trials} >= {"rivals", "labels", "tuning", "crowded", "mask", "hard"}
    for trial in trials:
        for method in trial.methods:
            lessons = method.lessons if isinstance(method, Network) else ()
            assert not set(trial.scenes) & set(lessons)
            assert {spec.particle for spec in lessons} <= {trial.particle}
    seen = {(trial.experiment, trial.case, trial.who) for trial in trials}
    assert len(seen) == len(trials)


def test_a_part_ends_in_time_and_shows_what_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, other = replace(FIELD, width=3.4), replace(FIELD, width=3.4, seed=7)
    trials = [
        Trial("rivals", "apo-ferritin", str(one.seed), (Gaussians(4.5),), (one,)) for one in (other, spec)
    ]
    monkeypatch.setitem(EXPERIMENTS, "rivals", lambda _: trials)
    # The second of both was done in an earlier part.
    run_trial(trials[1], replace(bench, folder=bench.folder / "small"))
    line = f"bench_paper.py --data {bench.data} --folder {bench.folder} --small --threads 1 --only rivals"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--minutes", "0"])
    assert bench_paper.main() == 75
    printed = capsys.readouterr().out
    assert "time is over after 1 of 2 trials; the same command goes on" in printed
    assert "2 of 2  rivals: apo-ferritin, 1: F1" in printed
    monkeypatch.setattr(sys, "argv", line.split())
    assert bench_paper.main() == 0
    rows = json.loads((bench.folder / "small" / "rows" / "rivals.json").read_text())
    assert [row["who"] for row in rows] == ["7", "1"]
    page = (bench.folder / "small" / "page.md").read_text()
    assert "| apo-ferritin | 130 | 7 |" in page
    assert "matching and Gaussians alone" in page
    assert "picker" not in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--only rivals --who nobody", "no trial of ['nobody']"),
        ("--only rivals", "lacks maps_10A/1f4a.mrc"),
        ("--angle 0", "0 is not above 0"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"bench_paper.py --data {tmp_path} --folder {tmp_path} --small --threads 1 {words}"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as ended:
        bench_paper.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
