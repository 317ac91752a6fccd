from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from tomocpt_stream.__main__ import main
from tomocpt_stream.evaluation import evaluate
from tomocpt_stream.formats import write_picks
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from pathlib import Path

VOXEL = 10.0


def _tables(names: tuple[str, ...] = ("TS_1", "TS_2")) -> tuple[dict[str, Picks], dict[str, Picks]]:
    """Return picks with scores, most of them near particles, and the particles."""
    picks, truth = {}, {}
    for seed, name in enumerate(names):
        rng = np.random.default_rng(seed)
        true = rng.uniform(10, 190, (30, 3))
        where = np.concatenate([true[:25] + rng.normal(0, 1, (25, 3)), rng.uniform(10, 190, (25, 3))])
        score = np.concatenate([rng.uniform(0.4, 1, 25), rng.uniform(0, 0.6, 25)]).astype(np.float32)
        picks[name] = Picks(where, score, voxel_size=VOXEL, tomogram=name)
        truth[name] = Picks(true, np.ones(30, np.float32), voxel_size=VOXEL, tomogram=name)
    return picks, truth


def _run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["evaluate", *map(str, words), "--diameter", "200"])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    picks, truth = _tables()
    write_picks(picks, tmp_path / "picks.star")
    write_picks(truth, tmp_path / "truth.star")
    return tmp_path / "picks.star", tmp_path / "truth.star"


def _facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text()))


def test_the_table_the_file_and_the_pictures_agree_with_the_functions(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = _run(*files, "--threshold", 0.5, "--beta", 2, "--output", out)
    picks, truth = _tables()
    above = {name: table.above(0.5) for name, table in picks.items()}
    expected = evaluate(above, truth, tolerance=100)
    facts = _facts(out)
    for name, one in [*expected.matches.items(), ("pooled", expected.pooled)]:
        written = facts["pooled"] if name == "pooled" else facts["tomograms"][name]
        assert (written["tp"], written["fp"], written["fn"]) == (one.tp, one.fp, one.fn)
        assert written["fbeta"] == pytest.approx(one.fbeta(2))
        assert written["mean_distance"] == pytest.approx(one.mean_distance, abs=1e-4)
        assert written["mean_distance_over_diameter"] == pytest.approx(one.mean_distance / 200, abs=1e-6)
        assert written["rmse"] == pytest.approx(one.rmse, abs=1e-4)
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(name))
        assert f"{one.tp}" in line.split()
        assert f"{one.f1:.3f}" in line.split()
        assert f"{one.fbeta(2):.3f}" in line.split()
        assert line.split()[-2:] == [f"{one.mean_distance:.1f}", f"{one.rmse:.1f}"]
    assert facts["tolerance"] == 100  # half the diameter
    interval = facts["intervals_95"]["fbeta"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    bounds = f"({interval['low']:.3f} to {interval['high']:.3f}, 95 %)"
    assert f"F2 {expected.pooled.fbeta(2):.3f} {bounds}" in result.stdout
    assert "2 tomograms: intervals from so few are too narrow" in result.stderr
    curve = pd.read_csv(out / "curve.csv")
    assert len(curve) == 100
    np.testing.assert_allclose(curve["fbeta"], 5 * curve["tp"] / (curve["picks"] + 4 * 60))
    _run(*files, "--threshold", 0.5, "--beta", 2, "--tolerance", 5, "--seed", 1, "--output", tmp_path)
    closer = evaluate(above, truth, tolerance=5).pooled
    assert (_facts(tmp_path)["pooled"]["tp"], _facts(tmp_path)["seed"]) == (closer.tp, 1)
    assert _facts(tmp_path)["pooled"]["tp"] < facts["pooled"]["tp"]
    assert matplotlib.image.imread(out / "curve.png").shape[1] > 1000
    assert sorted(path.name for path in out.iterdir()) == ["curve.csv", "curve.png", "evaluation.json"]


def test_the_sweep_evaluates_at_its_best_threshold(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = _run(*files, "--sweep", "--output", tmp_path)
    facts, curve = _facts(tmp_path), pd.read_csv(tmp_path / "curve.csv")
    assert facts["pooled"]["f1"] == pytest.approx(curve["f1"].max())
    assert facts["threshold"] == facts["best_of_the_curve"]["threshold"]
    assert facts["threshold_chosen_on_these_tomograms"] is True
    assert "the best for these very tomograms" in result.stdout
    assert facts["best_of_the_curve"]["tp"] == facts["pooled"]["tp"]
    assert isinstance(facts["best_of_the_curve"]["tp"], int)
    (printed,) = (line for line in result.stdout.splitlines() if line.startswith("picks above"))
    again = _run(*files, "--threshold", printed.split()[2].rstrip(","), "--output", tmp_path)
    assert _facts(tmp_path)["pooled"] == facts["pooled"]
    assert "very tomograms" not in again.stdout
    _run(*files, "--sweep", "--percentiles", "--output", tmp_path)
    assert len(pd.read_csv(tmp_path / "curve.csv")) == 13
    assert "leave out --threshold" in _run(*files, "--sweep", "--threshold", 0.5, code=2).stderr


def test_folders_and_sides_that_do_not_meet(tmp_path: Path) -> None:
    picks, truth = _tables(("TS_1", "TS_2", "TS_3"))
    for name, table in picks.items():
        write_picks(table, tmp_path / "picks" / f"{name}.star")
    (tmp_path / "picks" / "notes.txt").write_text("no picks")
    del truth["TS_2"]
    truth["TS_4"] = replace(truth["TS_1"], tomogram="TS_4")
    write_picks(truth, tmp_path / "truth.star")
    result = _run(tmp_path / "picks", tmp_path / "truth.star", "--output", tmp_path / "out")
    facts = _facts(tmp_path / "out")
    assert list(facts["tomograms"]) == ["TS_1", "TS_3", "TS_4"]
    assert (facts["without_truth"], facts["without_picks"]) == (["TS_2"], ["TS_4"])
    assert facts["tomograms"]["TS_4"]["mean_distance"] is None
    assert "left out, for there is no truth of them: TS_2" in result.stderr
    assert "all particles missed, for there are no picks of them: TS_4" in result.stderr
    write_picks(picks["TS_1"], tmp_path / "picks" / "again.star")
    twice = _run(tmp_path / "picks", tmp_path / "truth.star", code=1)
    assert "has picks on TS_1 twice, the last in" in twice.stderr


def test_a_folder_may_hold_scores_and_hidden_files(tmp_path: Path) -> None:
    picks, truth = _tables()
    folder = tmp_path / "picks"
    write_picks(picks, folder, format="coords")
    assert (folder / "TS_1.coords.scores.csv").exists()
    (folder / "._TS_1.coords").write_bytes(b"\0\5")
    write_picks(truth, tmp_path / "truth.star")
    out = tmp_path / "out"
    _run(folder, tmp_path / "truth.star", "--voxel-size", VOXEL, "--threshold", 0.5, "--output", out)
    above = {name: table.above(0.5) for name, table in picks.items()}
    assert _facts(out)["pooled"]["tp"] == evaluate(above, truth, tolerance=100).pooled.tp
    for kind in ("coords", "copick"):
        (tmp_path / kind).mkdir()
    (tmp_path / "coords" / "TS_1.coords").touch()  # nothing picked, and no voxel size
    _run(tmp_path / "coords", tmp_path / "truth.star", "--output", out)
    assert _facts(out)["pooled"]["fn"] == 60
    write_picks(picks, tmp_path / "copick", format="copick")
    refused = _run(tmp_path / "copick", tmp_path / "truth.star", code=1)
    assert "without a coordinate file" in refused.stderr
    assert "give --format" in refused.stderr
    _run(tmp_path / "copick", tmp_path / "truth.star", "--format", "copick", "--output", out)


def test_names_without_a_counterpart_are_listed(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, truth = _tables()
    write_picks({f"rec_{name}": table for name, table in truth.items()}, tmp_path / "other.star")
    result = _run(files[0], tmp_path / "other.star", code=1)
    assert "picks of TS_1, TS_2 and truth of rec_TS_1, rec_TS_2: no tomogram has both" in result.stderr


def test_masks_are_found_by_the_name_of_each_tomogram(files: tuple[Path, Path], tmp_path: Path) -> None:
    picks, truth = _tables()
    half = np.zeros((20, 20, 20), np.float32)
    half[:, :, :10] = 1
    for name in picks:
        write_mrc(tmp_path / f"{name}_mask.mrc", half, 100.0)
    out = tmp_path / "out"
    _run(*files, "--mask", tmp_path / "{tomogram}_mask.mrc", "--output", out)
    # voxels up to 94 of 10 Å have their nearest mask voxel, of 100 Å, among the first ten
    kept = [
        {name: table.take(np.floor(table.zyx[:, 2] + 0.5) < 95) for name, table in side.items()}
        for side in (picks, truth)
    ]
    expected = evaluate(*kept, tolerance=100).pooled
    pooled = _facts(out)["pooled"]
    assert (pooled["picks"], pooled["truth"], pooled["tp"]) == (expected.picks, expected.truth, expected.tp)
    assert 0 < expected.truth < 60
    result = _run(*files, "--mask", tmp_path / "TS_1_mask.mrc", code=1)
    assert "one mask for 2 tomograms" in result.stderr


def test_what_a_file_does_not_say_is_asked_for(files: tuple[Path, Path], tmp_path: Path) -> None:
    picks, _ = files
    bare = tmp_path / "bare.star"
    bare.write_text(
        "data_particles\n\nloop_\n_rlnMicrographName #1\n_rlnCoordinateX #2\n_rlnCoordinateY #3\n"
        "_rlnCoordinateZ #4\nTS_1 10 20 30\nTS_1 40 50 60\n"
    )
    result = _run(picks, bare, code=1)
    assert "bare.star does not say the voxel size of TS_1" in result.stderr
    assert "--truth-voxel-size" in result.stderr
    _run(picks, bare, "--truth-voxel-size", 5, "--output", tmp_path / "out")
    assert _facts(tmp_path / "out")["pooled"]["truth"] == 2


def test_the_seed_is_that_of_the_bootstrap(tmp_path: Path) -> None:
    picks, truth = _tables(tuple("abcdefg"))
    write_picks(picks, tmp_path / "picks.star")
    write_picks(truth, tmp_path / "truth.star")
    found = []
    for seed in (1, 2, 1):
        _run(tmp_path / "picks.star", tmp_path / "truth.star", "--seed", seed, "--output", tmp_path)
        found.append(_facts(tmp_path)["intervals_95"]["average_precision"])
    assert found[0] == found[2] != found[1]


def test_sizes_come_from_a_list_of_tomograms(files: tuple[Path, Path], tmp_path: Path) -> None:
    bare, sizes = tmp_path / "bare.star", tmp_path / "tomograms.star"
    columns = ("MicrographName", "CoordinateX", "CoordinateY", "CoordinateZ")
    bare.write_text("data_particles\nloop_\n" + "\n".join(f"_rln{one}" for one in columns) + "\nTS_1 1 2 3\n")
    sides = ("TomoName", "TomoSizeX", "TomoSizeY", "TomoSizeZ", "TomoTiltSeriesPixelSize")
    head = "\n".join(f"_rln{one}" for one in (*sides, "TomoTomogramBinning"))
    rows = "\n".join(f"TS_{i} 4000 4000 2000 2.5 4.0" for i in (1, 2))
    sizes.write_text(f"data_global\nloop_\n{head}\n{rows}\n")
    _run(files[0], bare, "--tomograms", sizes, "--output", tmp_path / "out")
    assert list(_facts(tmp_path / "out")["tomograms"]) == ["TS_1"]


def test_one_tomogram_without_scores_is_evaluated_and_said_to_be_so(tmp_path: Path) -> None:
    _, truth = _tables(("TS_1",))
    write_picks(truth, tmp_path / "a.star")
    write_picks(truth, tmp_path / "b.star")
    result = _run(tmp_path / "a.star", tmp_path / "b.star", "--output", tmp_path / "out")
    assert _facts(tmp_path / "out")["pooled"]["f1"] == 1.0
    assert _facts(tmp_path / "out")["intervals_95"]["f1"]["low"] is None
    assert "one tomogram: no intervals" in result.stderr
    assert "all picks have the same score" in result.stderr
    assert "F1 1.000\n" in result.stdout


def test_nothing_picked_at_all(tmp_path: Path) -> None:
    picks, truth = _tables()
    write_picks({name: table.above(2.0) for name, table in picks.items()}, tmp_path / "a.star")
    write_picks(truth, tmp_path / "b.star")
    _run(tmp_path / "a.star", tmp_path / "b.star", "--sweep", "--output", tmp_path / "out")
    assert _facts(tmp_path / "out")["pooled"]["fn"] == 60


def test_what_cannot_be_done_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    picks, truth = files
    assert "no file" in _run(picks, tmp_path / "no.star", code=1).stderr
    assert "finite" in _run(picks, truth, "--threshold", "nan", code=2).stderr
    for length in ("nan", "inf"):
        words = ["evaluate", str(picks), str(truth), "--diameter", length, "--tolerance", "9"]
        result = CliRunner().invoke(main, words)
        assert (result.exit_code, "for '--diameter'" in result.stderr) == (2, True)
    (tmp_path / "curve.csv").write_text("mine")
    refused = _run(tmp_path / "curve.csv", truth, "--output", tmp_path, code=1)
    assert "is an input" in refused.stderr
    assert (tmp_path / "curve.csv").read_text() == "mine"


def test_one_kind_of_particle_is_taken(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, truth = _tables()
    kinds = [
        replace(truth["TS_1"], particle="ribosome"),
        replace(truth["TS_2"], particle="VLP"),
        replace(truth["TS_2"].take(np.arange(4)), particle="ribosome"),
    ]
    write_picks(kinds, tmp_path / "kinds.csv")
    out = tmp_path / "out"
    _run(files[0], tmp_path / "kinds.csv", "--particle", "VLP", "--output", out)  # the picks name no kind
    assert list(_facts(out)["tomograms"]) == ["TS_2"]
    assert _facts(out)["pooled"]["truth"] == 30
    assert "'VLP' and of 'ribosome'" in _run(files[0], tmp_path / "kinds.csv", code=1).stderr
    classes = tmp_path / "classes.star"
    classes.write_text(
        "data_particles\n\nloop_\n_rlnMicrographName #1\n_rlnCoordinateX #2\n_rlnCoordinateY #3\n"
        "_rlnCoordinateZ #4\n_rlnClassNumber #5\nTS_1 10 20 30 3\nTS_1 40 50 60 5\nTS_2 1 2 3 3\n"
    )
    of_class = ("--truth-voxel-size", 10, "--particle", 3, "--output", out)
    _run(files[0], classes, *of_class)  # the picks have no classes
    assert [one["truth"] for one in _facts(out)["tomograms"].values()] == [1, 1]
    strange = _run(files[0], tmp_path / "kinds.csv", "--particle", "spike", code=1)
    assert "no truth of 'spike'" in strange.stderr
    assert "'VLP', 'ribosome'" in strange.stderr
