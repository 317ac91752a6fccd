from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import bench_sim10a
import numpy as np
import pytest
import sim10a_lessons
from bench_paper import PART_OVER
from matplotlib.figure import Figure
from sim10a_lessons import Lesson, survey, waited, with_radius
from sim10a_page import cost_table, reached, tuned_table, write_page, zero_table
from sim10a_scenes import CLASSES, Kind, Scene, more_scene, open_scene, options_of
from sim10a_scores import (
    counts_at,
    f1_elsewhere,
    interval_of_f1,
    pooled,
    share_interval,
    threshold_at_precision,
    zero_shot,
)

from tomocpt_stream import Picker, Picks, Window, load_picker, match, open_tomogram
from tomocpt_stream.curves import rank
from tomocpt_stream.network import build_network
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picker import picker_metadata
from tomocpt_stream.shapes import solid_template

if TYPE_CHECKING:
    from collections.abc import Sequence

DIAMETER = 100.0
GRID = np.array([[10.0, 10, 10], [10, 10, 40], [10, 40, 10], [10, 40, 40]])


def picks(points: Any, scores: Any, name: str = "a") -> Picks:
    where = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    return Picks(where, np.asarray(scores, dtype=np.float32), voxel_size=10.0, tomogram=name)


def truth(points: Any = GRID, name: str = "a") -> Picks:
    return picks(points, np.ones(len(points)), name)


def counts(*values: Sequence[int]) -> list[Any]:
    return [np.array(value) for value in values]


# Recall at a precision against all particles


def test_recall_is_taken_at_the_lowest_threshold_that_is_precise_enough_against_all() -> None:
    # Of the class two are found; the third pick is on another kind, the fourth and fifth on nothing.
    found = picks([GRID[0], GRID[1], GRID[2], [60, 60, 60], [80, 80, 80]], [0.9, 0.8, 0.7, 0.6, 0.5])
    row = zero_shot(found, truth(GRID[[0, 1, 3]]), truth(), diameter=DIAMETER, precision=0.75)
    assert (row["picks"], row["precision"], row["recall"]) == (4, 0.75, pytest.approx(2 / 3))
    assert row["threshold"] == pytest.approx(0.5)
    assert row["recall_of_all"] == 0.75
    # Against its own class alone no more than two picks would be precise enough.
    assert threshold_at_precision(rank(found, truth(GRID[[0, 1, 3]]), tolerance=50).curve(), 0.75) == (
        pytest.approx(0.7)
    )


def test_precision_that_falls_and_rises_again_counts_at_its_lowest_threshold() -> None:
    found = picks([[60, 60, 60], *GRID], [0.9, 0.8, 0.7, 0.6, 0.5])
    row = zero_shot(found, truth(), truth(), diameter=DIAMETER, precision=0.8)
    assert (row["picks"], row["recall"]) == (5, 1.0)


@pytest.mark.parametrize("found", [picks([[60, 60, 60]], [0.9]), picks([], [])])
def test_a_precision_that_is_never_reached_has_no_recall(found: Picks) -> None:
    row = zero_shot(found, truth(), truth(), diameter=DIAMETER, precision=0.8)
    assert row["threshold"] is None
    assert "recall" not in row
    assert row["highest_precision"] == 0.0
    assert any("| never |" in line for line in zero_table([row | {"kind": "rubisco", "name": "as it is"}]))


@pytest.mark.parametrize(("hits", "of"), [(0, 14), (7, 14), (14, 14), (190, 200)])
def test_wilsons_interval_solves_its_equation(hits: int, of: int) -> None:
    for bound in share_interval(hits, of):
        if 0 < bound < 1:
            assert (hits / of - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / of)
    low, high = share_interval(hits, of)
    assert 0 <= low <= hits / of <= high <= 1
    assert high - low > 0
    assert share_interval(0, 0) == (0.0, 1.0)


# Pooled F1 and its interval


def test_counts_are_those_of_matching_each_tomogram_alone() -> None:
    rng = np.random.default_rng(3)
    names = ["a", "b", "c"]
    true = {name: truth(rng.uniform(0, 80, (8, 3)), name) for name in names}
    found = {
        name: picks(
            np.concatenate([true[name].zyx[:6] + 1, rng.uniform(0, 80, (6, 3))]), rng.random(12), name
        )
        for name in names
    }
    hits, wrong, particles = counts_at(rank(found, true, tolerance=50), 0.4)
    for at, name in enumerate(names):
        alone = match(found[name].above(0.4), true[name], tolerance=50)
        assert (hits[at], wrong[at], particles[at]) == (alone.tp, alone.fp, alone.truth)


def test_the_interval_has_the_spread_of_particles_in_equal_tomograms() -> None:
    one = interval_of_f1(*counts([80], [0], [100]))
    # F1 is 2h / (h + 100): its slope at h = 80 times the deviation of a binomial of 100 at 0.8.
    spread = 200 / 180**2 * np.sqrt(100 * 0.8 * 0.2)
    assert one.value == pytest.approx(160 / 180)
    assert (one.high - one.low) / (2 * 1.96) == pytest.approx(spread, rel=0.08)
    four = interval_of_f1(*counts([80] * 4, [0] * 4, [100] * 4))
    assert (four.high - four.low) / (one.high - one.low) == pytest.approx(0.5, rel=0.08)


def test_tomograms_that_differ_widen_the_interval() -> None:
    alike = interval_of_f1(*counts([10] * 6, [0] * 6, [20] * 6))
    unlike = interval_of_f1(*counts([20, 0] * 3, [0] * 6, [20] * 6))
    assert unlike.value == alike.value
    assert unlike.high - unlike.low > 2 * (alike.high - alike.low)


def test_false_picks_widen_the_interval_and_lower_the_value() -> None:
    clean = interval_of_f1(*counts([20], [0], [20]))
    dirty = interval_of_f1(*counts([20], [10], [20]))
    assert (clean.low, clean.high) == (1.0, 1.0)
    assert dirty.value == 0.8
    assert dirty.low < 0.75 < 0.8 < dirty.high < 1


def test_nothing_found_and_nothing_there_are_zero() -> None:
    none = interval_of_f1(*counts([0, 0], [3, 0], [5, 5]))
    assert (none.value, none.low, none.high) == (0.0, 0.0, 0.0)
    empty = interval_of_f1(*counts([0], [0], [0]))
    assert (empty.value, empty.low, empty.high) == (0.0, 0.0, 0.0)


def test_an_interval_is_the_same_again_and_holds_its_value() -> None:
    some = counts([12, 9, 14], [2, 0, 5], [14, 14, 14])
    one, again = interval_of_f1(*some), interval_of_f1(*some)
    assert (one.low, one.high) == (again.low, again.high)
    assert one.low < one.value < one.high


def test_a_threshold_from_elsewhere_is_not_that_of_the_tomogram_itself() -> None:
    # Each tomogram alone is perfect, at thresholds that suit it only.
    found = {
        "a": picks([*GRID, [60, 60, 60]], [0.9] * 4 + [0.8], "a"),
        "b": picks([*GRID, [60, 60, 60]], [0.5] * 4 + [0.4], "b"),
    }
    true = {name: truth(name=name) for name in found}
    # a at b's threshold 0.4 has one false pick; b at a's threshold 0.8 has nothing.
    assert f1_elsewhere(found, true, tolerance=50) == pytest.approx(2 * 4 / (4 + 1 + 8))
    assert f1_elsewhere({"a": found["a"]}, {"a": true["a"]}, tolerance=50) is None


def test_pooled_figures_are_of_one_threshold_and_in_diameters() -> None:
    true = {name: truth(name=name) for name in ("a", "b")}
    found = {
        "a": picks([*np.add(GRID, [0, 0, 1]), [60, 60, 60]], [0.9, 0.8, 0.7, 0.6, 0.2], "a"),
        "b": picks(np.add(GRID[:2], [0, 0, 3]), [0.9, 0.25], "b"),
    }
    row = pooled(found, true, diameter=DIAMETER)
    assert (row["truth"], row["tomograms"]) == (8, 2)
    assert row["f1"] == pytest.approx(2 * 6 / (6 + 8))
    assert 0.2 <= row["threshold"] < 0.25
    assert row["f1_calibrated"] == pytest.approx(2 * 5 / (5 + 8))
    assert (row["median_distance"], row["mean_distance"]) == (
        pytest.approx(0.1),
        pytest.approx((4 * 0.1 + 2 * 0.3) / 6),
    )
    assert row["f1_of_tomograms"] == {"a": 1.0, "b": pytest.approx(2 / 3)}
    assert row["interval"][0] < row["f1"] < row["interval"][1]


def test_tomograms_without_a_pick_are_missed_whole() -> None:
    true = {name: truth(name=name) for name in ("a", "b")}
    row = pooled({name: picks([], [], name) for name in true}, true, diameter=DIAMETER)
    assert (row["f1"], row["f1_elsewhere"], row["median_distance"]) == (0.0, 0.0, None)


# Tomograms


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of the density maps, which are called as theirs are."""
    data = tmp_path_factory.mktemp("data")
    (data / "maps").mkdir()
    for name, diameter in (("big", 200.0), ("small", 120.0)):
        solid = solid_template("horseshoe", diameter, 10.0)
        write_mrc(data / "maps" / f"{name}.mrc", solid.density, solid.pitch)
    return data


KINDS = (Kind("virus-like-particle", "maps/big", 3, 300.0, 0.9), Kind("distractor-x", "maps/small", 4))


@pytest.fixture(scope="module")
def scene(maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return more_scene(1, data=maps, folder=tmp_path_factory.mktemp("more"), kinds=KINDS)


def test_a_tomogram_of_the_same_make_has_the_numbers_optics_and_grey_levels_of_the_files(
    scene: Scene, maps: Path
) -> None:
    assert {name: len(some) for name, some in scene.truth.items()} == {one.name: one.count for one in KINDS}
    assert len(scene.all()) == 7
    tomogram = scene.tomogram
    assert (tomogram.shape, tomogram.voxel_size, str(tomogram.dtype)) == ((96, 256, 256), 10.0, "int8")
    voxels = tomogram.read((slice(0, 96), slice(0, 256), slice(0, 256)))
    assert (abs(voxels.mean()) < 0.1, round(float(voxels.std()))) == (True, 25)
    options = [options_of(number, maps, KINDS) for number in range(3)]
    assert [(one.snr, one.defocus) for one in options] == [(0.05, 3.0), (0.04, 3.5), (0.05, 3.2)]
    assert all((len(one.tilts), one.tilts[0], one.tilts[-1]) == (41, -60, 60) for one in options)
    # Protein is dark: the larger particle's rim is below the mean of the ice.
    z, y, x = np.rint(scene.truth["virus-like-particle"].zyx[0]).astype(int)
    around = voxels[z - 9 : z + 10, y - 9 : y + 10, x - 9 : x + 10]
    assert around.mean() < -1.0


def test_a_tomogram_is_made_once(scene: Scene, maps: Path) -> None:
    folder = Path(str(scene.tomogram.source)).parent
    before = (folder / "more_1.mrc").stat().st_mtime_ns
    again = more_scene(1, data=maps, folder=folder, kinds=KINDS)
    assert (folder / "more_1.mrc").stat().st_mtime_ns == before
    assert np.array_equal(again.all().zyx, scene.all().zyx)


def test_others_are_the_other_classes_without_distractors() -> None:
    volume = open_tomogram(np.zeros((8, 8, 8), np.float32), voxel_size=10.0, name="a")
    kinds = ("ribosome", "rubisco", "distractor-cdc48")
    made = Scene(volume, {kind: truth(GRID[k : k + 1]) for k, kind in enumerate(kinds)})
    assert made.others("ribosome").zyx.tolist() == [GRID[1].tolist()]
    assert len(made.all()) == 3


def test_the_files_are_read_as_their_own_star_files_say(shared_data: Path) -> None:
    from tomocpt_stream import read_picks

    for name in ("sim_val_1", "sim_train_1", "sim_train_2"):
        found = open_scene(shared_data / "sim10A", name)
        assert {kind: len(found.truth[kind]) for kind in CLASSES} == {
            kind.name: kind.count for kind in CLASSES.values()
        }
        assert len(found.all()) == 92
        table = read_picks(shared_data / "sim10A" / f"{name}.star", voxel_size=10.0)[name]
        assert np.array_equal(np.sort(found.of(CLASSES).zyx, axis=0), np.sort(table.zyx, axis=0))


# Lessons


@pytest.fixture(scope="module")
def picker() -> Picker:
    """The smallest network there is, which knows nothing."""
    architecture = {"network": "SwinUNETR", "feature_size": 12, "depths": [1, 1, 1, 1], "window": 4}
    architecture |= {"num_heads": [1, 1, 1, 1], "use_v2": True, "merging": "merging"}
    rates = {"drop_rate": 0.0, "attention_drop_rate": 0.0, "path_drop_rate": 0.0}
    network = build_network(architecture | rates)
    return Picker(network, picker_metadata(architecture | rates, window=Window((32, 32, 32), (4, 4, 4))))


def test_another_radius_is_another_working_grid_with_the_same_weights(picker: Picker) -> None:
    finer = with_radius(picker, 12.5)
    assert finer.particle_radius == 12.5
    assert finer.fingerprint != picker.fingerprint
    assert with_radius(finer, 10.0).fingerprint == picker.fingerprint
    assert with_radius(picker, None) is picker


def test_lessons_that_differ_in_anything_have_files_of_their_own() -> None:
    plain = Lesson("rubisco", "0" * 64)
    other = [
        replace(plain, steps=10),
        replace(plain, radius=12.0),
        replace(plain, others=True),
        replace(plain, rate=1e-4),
        replace(plain, seed=1),
        replace(plain, augment=(("tilt", 15.0),)),
        replace(plain, batch=2),
        replace(plain, more=8),
    ]
    assert len({one.key for one in (plain, *other)}) == len({one.name for one in (plain, *other)}) == 9
    assert replace(plain, augment=(("tilt", 15.0),)).augmentation().tilt == 15.0
    assert plain.augmentation().turns


def test_the_survey_says_what_the_split_costs(scene: Scene, picker: Picker, tmp_path: Path) -> None:
    kind = CLASSES["virus-like-particle"]
    examples = sim10a_lessons.examples_of([scene], kind, others=True)
    seen = survey(examples, picker, Lesson(kind.name, picker.fingerprint, batch=2), tmp_path)
    assert (seen.particles, seen.voxel_size) == (3, 15.0)
    assert seen.steps == -(-seen.crops // 2)
    assert 0 < seen.learnt <= 3
    assert any(remark.startswith("validation") for remark in seen.remarks)
    assert not len(examples[0].others)  # type: ignore[arg-type]  # distractors are nobody's class


# The command


def test_the_command_goes_on_where_it_ended_and_keeps_rows_of_other_lessons(
    scene: Scene, picker: Picker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = tmp_path / "work", tmp_path / "data"
    (data / "sim10A").mkdir(parents=True)
    source = Path(str(scene.tomogram.source))
    for name in ("sim_val_1", "sim_train_1", "sim_train_2"):
        for suffix in (".mrc", ".json"):
            (data / "sim10A" / f"{name}{suffix}").symlink_to(source.with_suffix(suffix))
    picker.save(tmp_path / "picker.safetensors")
    taught: list[dict[str, Any]] = []

    def fake_fine_tune(examples: Any, *, on_step: Any, **asked: Any) -> Picker:
        taught.append({"examples": examples, **asked})
        on_step(SimpleNamespace(step=1, steps=2, loss=0.5, validation=None))
        on_step(SimpleNamespace(step=2, steps=2, loss=0.4, validation=0.25))
        parent: Picker = asked["picker"]
        return parent.shifted(0.5)

    picked: list[str] = []

    def fake_pick(tomogram: Any, _: Any, __: Any) -> Picks:
        picked.append(tomogram.name)
        return picks(scene.truth["virus-like-particle"].zyx, [0.9, 0.8, 0.7], tomogram.name)

    monkeypatch.setattr(sim10a_lessons, "fine_tune", fake_fine_tune)
    monkeypatch.setattr(bench_sim10a, "pick", fake_pick)
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())  # drawn by another test
    common = ["bench_sim10a.py", "--data", str(data), "--folder", str(folder), "--tomograms", "0"]
    common += [
        "--picker",
        str(tmp_path / "picker.safetensors"),
        "--only",
        "virus-like-particle",
        "--threads",
        "1",
    ]

    monkeypatch.setattr(sys, "argv", [*common, "--minutes", "0"])
    assert bench_sim10a.main() == PART_OVER
    assert not picked
    monkeypatch.setattr(sys, "argv", [*common, "--steps", "5"])
    assert bench_sim10a.main() == 0
    assert (taught[0]["epochs"], picked) == (
        1,
        ["sim_val_1", "sim_val_1", "sim_train_1", "sim_train_2"],
    )
    assert [one.tomogram.name for one in taught[0]["examples"]] == ["sim_train_1", "sim_train_2"]
    first = (folder / "page.md").read_text()
    assert bench_sim10a.main() == 0
    assert (len(taught), len(picked)) == (1, 4)
    assert (folder / "page.md").read_text() == first

    monkeypatch.setattr(sys, "argv", [*common, "--others", "--epochs", "3"])
    assert bench_sim10a.main() == 0
    assert taught[1]["epochs"] == 3
    page = (folder / "page.md").read_text()
    assert "5 steps" in page
    assert "3 epochs, others" in page
    for words in ("--steps 5", "--epochs 3 --others"):
        line = (
            f"- `bench_sim10a.py --part tuned --only virus-like-particle --tomograms 0 {words} --picker FILE`"
        )
        assert line in page
    numbers: list[int] = []

    def made(_: Any, number: int) -> Scene:
        numbers.append(number)
        return scene

    monkeypatch.setattr(bench_sim10a.Bench, "made", made)
    monkeypatch.setattr(sys, "argv", [*common, "--lessons", "1", "--tomograms", "1"])
    assert bench_sim10a.main() == 0
    assert numbers == [0, 200]  # what is tested on is never learnt from
    assert len(taught[2]["examples"]) == 3
    assert "20 epochs, 1 more tomograms" in (folder / "page.md").read_text()
    assert str(tmp_path) not in page
    assert (folder / "curves.png").exists()
    assert (folder / "bars.png").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--augment", "tilt"],
        ["--augment", "tilt=40"],
        ["--augment", "colour=1"],
        ["--steps", "-1"],
        ["--tomograms", "201"],
        ["--lessons", "-1"],
        ["--batch", "0"],
        ["--only", "rubiscos"],
        ["--data", "nowhere"],
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_any_work(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sim10A").mkdir()
    (tmp_path / "sim10A" / "sim_val_1.json").write_text("{}")
    folder = tmp_path / "work"
    monkeypatch.setattr(
        sys, "argv", ["bench_sim10a.py", "--data", str(tmp_path), "--folder", str(folder), *wrong]
    )
    with pytest.raises(SystemExit) as stopped:
        bench_sim10a.main()
    assert stopped.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
    assert not folder.exists()


# The page


def tuned_row(**changes: Any) -> dict[str, Any]:
    row = {
        "part": "tuned", "kind": "rubisco", "name": "20 epochs", "f1": 0.78, "interval": [0.74, 0.82],
        "threshold": 0.4, "precision": 0.8, "recall": 0.76, "f1_elsewhere": None, "f1_calibrated": 0.75,
        "interval_calibrated": [0.7, 0.8], "f1_of_tomograms": {"sim_val_1": 0.8}, "median_distance": 0.05,
        "mean_distance": 0.07, "truth": 14, "tomograms": 1, "windows": 10, "core_seconds": 5.0,
        "curve": [[0.0, 1.0], [1.0, 0.5]], "lesson": asdict(Lesson("rubisco", "0" * 64)), "waited": 0.004,
        "f1_learnt": 0.97,
    }  # fmt: skip
    return row | changes


def test_an_aim_is_reached_by_the_figure_not_by_its_interval() -> None:
    assert reached(tuned_row(), 0.78) == "yes"
    assert reached(tuned_row(), 0.80) == "within the interval"
    assert reached(tuned_row(), 0.90) == "no"


def test_the_page_says_what_cannot_be_resolved_and_where_distances_are_too_far() -> None:
    text = "\n".join(tuned_table([tuned_row()]))
    assert "told from chance in all rows;" in text
    assert "6% of the diameter in all rows." in text
    wide = tuned_row(name="wide", interval=[0.6, 0.9], median_distance=0.06)
    text = "\n".join(tuned_table([tuned_row(), wide]))
    assert "told from chance in all rows but rubisco (wide);" in text
    assert "6% of the diameter in all rows but rubisco (wide)." in text
    assert "told from chance in no row;" in "\n".join(tuned_table([wide]))


def test_the_page_has_the_command_of_each_row() -> None:
    lesson = Lesson(
        "rubisco", "0" * 64, steps=30, rate=1e-3, radius=14.0, average=0.98, validate=True, more=8,
        augment=(("noise", 0.3), ("tilt", 15.0)),
    )  # fmt: skip
    text = "\n".join(tuned_table([tuned_row(lesson=asdict(lesson), tomograms=3)]))
    assert "| 0.80 | 0.97 |" in text
    assert (
        "`bench_sim10a.py --part tuned --only rubisco --tomograms 2 --steps 30 --rate 0.001 --radius 14 "
        "--average 0.98 --lessons 8 --validate --picker FILE --augment noise=0.3 tilt=15`"
    ) in text
    shipped = asdict(Lesson("rubisco", load_picker("base").fingerprint))
    assert "--epochs 20`" in "\n".join(tuned_table([tuned_row(lesson=shipped)]))


def test_the_share_that_a_network_waited_is_that_of_its_curves(tmp_path: Path) -> None:
    assert waited(tmp_path) is None
    (tmp_path / "curves.csv").write_text("step,seconds,waited\n1,3.0,0.1\n2,1.0,0.1\n")
    assert waited(tmp_path) == pytest.approx(0.05)


def test_costs_are_of_the_steps_asked_for() -> None:
    account = {
        "voxel_size": 6.0, "learnt": 20, "kept": 5, "particles": 28, "crops": 400, "steps_in_all": 1800,
        "step_core_seconds": 2.0,
    }  # fmt: skip
    line = cost_table([tuned_row(account=account)])[2]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == (
        ["6", "20", "5", "28", "400", "1800", "2.0", "0.4", "1.00", "10", "0.50", "0.00"]
    )
    unmeasured = cost_table([tuned_row(account=account | {"step_core_seconds": None})])[2]
    assert [cell.strip() for cell in unmeasured.split("|")[9:12]] == ["", "0.4", ""]


def test_a_page_of_one_part_alone_is_whole(tmp_path: Path) -> None:
    page = write_page([tuned_row(median_distance=None, mean_distance=None, curve=[])], ["- head"], tmp_path)
    assert "As it is" not in page.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "curves.png", "bars.png"}
