"""The commands, from the words typed to the files written; a matched filter stands in for the picker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from click.testing import CliRunner, Result

from tests.blobs import NamedBlobPicker, blobs, nearest
from tests.buckets import portal_zarr
from tomocpt_stream import phantom, picker, pipeline
from tomocpt_stream.__main__ import main
from tomocpt_stream.formats import read_picks
from tomocpt_stream.heatmap import open_heatmap
from tomocpt_stream.phantom import PhantomOptions, write_mrc
from tomocpt_stream.tomogram import Tomogram

SHAPE = (30, 50, 44)
CENTRES = np.array([[8.0, 10.3, 9.0], [20.6, 12.0, 33.2], [15.0, 36.4, 20.5], [22.0, 40.0, 38.0]])
PICK = ["pick", "--diameter", "80"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and a stand-in for the shipped picker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picker, "load_picker", lambda *_, **__: NamedBlobPicker())
    return tmp_path


def run(*words: str | Path, code: int = 0) -> Result:
    """Run a command; its exit code must be `code`, and nothing but a clean exit may end it."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def mrc(path: Path | str, volume: npt.NDArray[np.float32] | None = None, voxel_size: float = 10.0) -> Path:
    """Write a tomogram with four blobs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mrc(path, blobs(SHAPE, CENTRES) if volume is None else volume, voxel_size)
    return path


def names(folder: Path | str) -> list[str]:
    return sorted(item.name for item in Path(folder).iterdir())


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_says_units(command: str | None) -> None:
    shown = run(*([] if command is None else [command]), "--help").output
    assert "Usage:" in shown
    assert command in (None, "train", "demo", "portal") or "Å" in shown


def test_the_commands_of_the_package() -> None:
    assert {"pick", "simulate", "train", "inspect", "demo"} <= set(main.commands)


def test_the_module_is_the_command() -> None:
    code = [sys.executable, "-m", "tomocpt_stream", "--help"]
    done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert all(name in done.stdout for name in main.commands)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_contrast_is_found_and_said(sign: int) -> None:
    mrc("TS_01.mrc", sign * blobs(SHAPE, CENTRES))
    shown = run(*PICK, "TS_01.mrc", "--no-picture")
    assert "protein looks dark or bright: 16 windows more, at both signs, tell" in shown.stdout
    assert f"TS_01: protein looks {'dark' if sign > 0 else 'bright'}: " in shown.stderr
    assert len(read_picks("picks/TS_01.star")["TS_01"]) == len(CENTRES)


def test_inspect_counts_the_windows_that_tell_the_contrast() -> None:
    mrc("TS_01.mrc")
    words = ["inspect", "TS_01.mrc", "--diameter", "80", "--no-picture"]
    assert "16 windows more, at both signs" in run(*words).stdout
    assert "protein looks bright\n" in run(*words, "--contrast", "bright").stdout


def test_pick_writes_a_star_and_a_picture() -> None:
    mrc("in/TS_01.mrc")
    shown = run(*PICK, "in/TS_01.mrc").output
    assert names("picks") == ["TS_01.png", "TS_01.star"]
    found = read_picks("picks/TS_01.star")["TS_01"]
    assert len(found) == len(CENTRES)
    assert nearest(found.zyx, CENTRES).max() < 0.3
    assert "TS_01: 30 x 50 x 44 (zyx) = 66,000 voxels of 10 Å" in shown
    assert "passes per voxel" in shown
    assert "spacing 60 Å, threshold 0.3" in shown
    assert "4 picks in" in shown
    assert "voxels/s" in shown
    assert Path("picks/TS_01.png").read_bytes().startswith(b"\x89PNG")


def test_pick_hands_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = pipeline.pick

    def spy(tomogram: Tomogram, model: Any, options: Any, **settings: Any) -> Any:
        seen.update(tomogram=tomogram, options=options, **settings)
        return real(tomogram, model, options, **settings)

    def load(source: str, *, device: str, storage_options: dict[str, Any]) -> NamedBlobPicker:
        seen.update(source=source, device=device)
        assert storage_options == {}
        return NamedBlobPicker()

    monkeypatch.setattr(pipeline, "pick", spy)
    monkeypatch.setattr(picker, "load_picker", load)
    volume = -blobs(SHAPE, CENTRES).transpose(1, 0, 2)[:, ::-1]
    mrc("a.mrc", np.ascontiguousarray(volume), voxel_size=7.0)
    mrc("mask.mrc", np.ones_like(volume), voxel_size=10.0)
    words = (
        "a.mrc --contrast bright --threshold 0.4 --min-distance 70 --margin 20 --mask mask.mrc "
        "--output out.star --format relion5 --keep-heatmap maps --device cpu --voxel-size 10 --beam-axis y "
        "--stitch crop --tta --batch-size 3 --scratch scratch --picker mine.safetensors --no-picture"
    )
    run(*PICK, *words.split(), "--memory", "2 GB")
    options = seen["options"]
    assert (options.diameter, options.contrast, options.threshold) == (80, "bright", 0.4)
    assert (options.min_distance, options.margin, options.stitch) == (70, 20, "crop")
    assert (options.tta, options.batch_size) == (True, 3)
    assert (seen["source"], seen["device"], seen["memory"]) == ("mine.safetensors", "cpu", "2 GB")
    assert (seen["mask"], seen["scratch"]) == ("mask.mrc", "scratch")
    tomogram = seen["tomogram"]
    assert (tomogram.voxel_size, tomogram.frame.beam_axis) == (10.0, "y")
    assert "_rlnCenteredCoordinateXAngst" in Path("out.star").read_text()
    assert open_heatmap("maps/a.zarr").shape == SHAPE
    assert not Path("out.png").exists()
    assert len(names("scratch")) == 1


def test_the_coarsest_level_is_read_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tomogram] = []
    real = pipeline.pick

    def spy(tomogram: Tomogram, *arguments: Any, **settings: Any) -> Any:
        seen.append(tomogram)
        return real(tomogram, *arguments, **settings)

    monkeypatch.setattr(pipeline, "pick", spy)
    portal_zarr(Path("a.zarr"), blobs(SHAPE, CENTRES), 5.0, 32)
    run(*PICK, "a.zarr", "--no-picture")
    run(*PICK, "a.zarr", "--no-picture", "--coarsest-level", "--missing", "fill")
    assert [tomogram.level for tomogram in seen] == [0, 1]


def test_relion_5_reads_back() -> None:
    mrc("TS.mrc")
    run(*PICK, "TS.mrc", "--output", "out/", "--format", "relion5", "--no-picture")
    found = read_picks("out/TS.star", voxel_size=10.0, shape=SHAPE)["TS"]
    assert nearest(found.zyx, CENTRES).max() < 0.3
    assert names("out") == ["TS.star"]


def test_several_tomograms_share_a_star() -> None:
    mrc("a.mrc")
    mrc("b.mrc", blobs(SHAPE, CENTRES[:2]))
    run(*PICK, "a.mrc", "b.mrc", "--output", "all.star")
    found = read_picks("all.star")
    assert {name: len(picks) for name, picks in found.items()} == {"a": 4, "b": 2}
    assert {"all_a.png", "all_b.png", "all.star"} <= set(names("."))


def test_one_bad_tomogram_does_not_stop_the_others() -> None:
    mrc("a.mrc")
    mrc("flat.mrc", np.zeros(SHAPE, dtype=np.float32))
    Path("cut.mrc").write_bytes(Path("a.mrc").read_bytes()[:-1000])
    mrc("z.mrc")
    result = run(*PICK, "a.mrc", "flat.mrc", "cut.mrc", "gone.mrc", "z.mrc", code=1)
    assert names("picks") == ["a.png", "a.star", "z.png", "z.star"]
    for name in ("flat.mrc", "cut.mrc", "gone.mrc"):
        assert re.search(rf"^{name}: \w*SourceError: ", result.stderr, flags=re.MULTILINE)
    assert "Traceback" not in result.output
    assert "3 of 5 tomograms were not done: flat.mrc, cut.mrc, gone.mrc" in result.stderr
    assert "flat.mrc" not in result.stdout


def test_an_unforeseen_error_is_shown_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    mrc("a.mrc")
    mrc("b.mrc")
    real = pipeline.pick

    def fail(tomogram: Tomogram, *others: Any, **settings: Any) -> Any:
        if tomogram.name == "a":
            raise ZeroDivisionError("a bug")
        return real(tomogram, *others, **settings)

    monkeypatch.setattr(pipeline, "pick", fail)
    result = run(*PICK, "a.mrc", "b.mrc", "--output", "all.star", code=1)
    assert "Traceback" in result.stderr
    assert "a.mrc: ZeroDivisionError: a bug" in result.stderr
    assert list(read_picks("all.star")) == ["b"]


def test_a_picture_that_fails_costs_no_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    mrc("a.mrc")
    Path("picks/a.png").mkdir(parents=True)
    result = run(*PICK, "a.mrc", code=1)
    assert len(read_picks("picks/a.star")["a"]) == 4
    assert "a.mrc: " in result.stderr


def test_equal_names_of_two_folders_are_kept_apart() -> None:
    mrc("one/TS.mrc")
    mrc("two/TS.mrc", blobs(SHAPE, CENTRES[:2]))
    run(*PICK, "one/TS.mrc", "two/TS.mrc", "--no-picture")
    assert names("picks") == ["one_TS.star", "two_TS.star"]
    run(*PICK, "one/TS.mrc", "two/TS.mrc", "--no-picture", "--output", "all.star")
    assert {name: len(picks) for name, picks in read_picks("all.star").items()} == {"one_TS": 4, "two_TS": 2}


def test_an_input_is_never_overwritten() -> None:
    mrc("a.mrc")
    zarr.create_array("b.zarr", data=blobs(SHAPE, CENTRES))
    shutil.copy("a.mrc", "in.star")
    before = Path("in.star").read_bytes()
    for words in (
        ["a.mrc", "b.zarr", "--output", "b.zarr/"],
        ["b.zarr", "--keep-heatmap", "."],
        ["a.mrc", "--mask", "in.star", "--output", "in.star"],
        ["in.star", "--output", "in.star"],
    ):
        result = run(*PICK, *words, "--voxel-size", "10", code=1)
        assert "is an input" in result.stderr
        assert result.stdout == ""
    assert Path("in.star").read_bytes() == before
    assert names(".") == ["a.mrc", "b.zarr", "in.star"]


def test_a_scratch_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NamedBlobPicker()
    monkeypatch.setattr(picker, "load_picker", lambda *_, **__: model)
    mrc("a.mrc")
    run(*PICK, "a.mrc", "--scratch", "scratch", "--no-picture")
    assert model.batches > 0
    model.batches = 0
    run(*PICK, "a.mrc", "--scratch", "scratch", "--no-picture", "--output", "again/")
    assert model.batches == 0
    assert Path("again/a.star").read_text() == Path("picks/a.star").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["pick", "a.mrc"],
        ["pick", "--diameter", "80"],
        ["pick", "a.mrc", "--diameter", "0"],
        ["pick", "a.mrc", "--diameter", "80", "--threshold", "2"],
        ["pick", "a.mrc", "--diameter", "80", "--stitch", "sewn"],
        ["pick", "a.mrc", "--diameter", "80", "--margin", "-1"],
        ["simulate"],
        ["choose"],
    ],
)
def test_a_command_that_is_not_understood_ends_with_2(words: list[str]) -> None:
    mrc("a.mrc")
    run(*words, code=2)
    assert names(".") == ["a.mrc"]


def test_an_actionable_error_is_one_line() -> None:
    result = run("inspect", "gone.mrc", code=1)
    assert result.stderr.startswith("Error: there is no file")
    assert "Traceback" not in result.output
    mrc("a.mrc")
    assert "memory budget" in run(*PICK, "a.mrc", "--memory", "lots", code=1).stderr


def test_inspect_reads_no_voxel(monkeypatch: pytest.MonkeyPatch) -> None:
    mrc("TS_01.mrc", voxel_size=8.0)
    monkeypatch.setattr(Tomogram, "read", lambda self, box: pytest.fail("a voxel was read"))
    plain = run("inspect", "TS_01.mrc")
    assert "30 x 50 x 44 voxels (z, y, x)" in plain.stdout
    assert "8 Å" in plain.stdout
    assert plain.stderr == ""
    planned = run("inspect", "TS_01.mrc", "--diameter", "80", "--no-picture").stdout
    assert "working voxel size 10 Å" in planned
    assert "passes per voxel" in planned
    assert "GB" in planned
    assert "ratio of working to source voxel size 1.25" in planned
    assert names(".") == ["TS_01.mrc"]


def test_inspect_draws_the_size() -> None:
    mrc("TS_01.mrc")
    run("inspect", "TS_01.mrc", "--diameter", "80")
    run("inspect", "TS_01.mrc", "--diameter", "80", "--output", "new/size.png")
    assert Path("TS_01_size.png").read_bytes() == Path("new/size.png").read_bytes()
    assert (
        "is an input"
        in run("inspect", "TS_01.mrc", "--diameter", "80", "--output", "TS_01.mrc", code=1).stderr
    )


def test_inspect_warns_of_what_will_cost() -> None:
    mrc("TS_01.mrc")
    assert "up-sampling" in run("inspect", "TS_01.mrc", "--diameter", "58", "--no-picture").stderr
    assert run("inspect", "TS_01.mrc", "--diameter", "62", "--no-picture").stderr == ""
    mrc("unturned.mrc", np.zeros((50, 30, 44), dtype=np.float32))
    assert "z is not the thinnest axis" in run("inspect", "unturned.mrc").stderr
    assert run("inspect", "unturned.mrc", "--beam-axis", "y").stderr == ""


def test_simulate_writes_tomogram_and_truth() -> None:
    options = (
        "--shape 24 64 64 --diameter 120 --count 3 --distractors 0 --gold 0 --tilt-step 20 --particle globule"
    )
    words = ["simulate", *options.split(), "--seed", "5", "--output"]
    run(*words, "new/one.mrc")
    run(*words, "new/two.mrc")
    assert names("new") == ["one.mrc", "one_truth.star", "two.mrc", "two_truth.star"]
    one, two = mrcfile.read("new/one.mrc"), mrcfile.read("new/two.mrc")
    assert one.shape == (24, 64, 64)
    np.testing.assert_array_equal(one, two)
    truth = read_picks("new/one_truth.star")["one"]
    assert (len(truth), truth.voxel_size) == (3, 10.0)
    assert "no room for target" in run(*words, "new/three.mrc", "--count", "90", code=1).stderr
    assert "is an input" in run(*words, "new/one.mrc", "--particle", "new/one.mrc", code=1).stderr
    assert len(names("new")) == 4


def test_the_demo_compares_with_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(
        PhantomOptions, shape=(40, 96, 96), count=4, distractors=0, filaments=0, gold=0, tilt_step=15, snr=1.0
    )
    monkeypatch.setattr(phantom, "PhantomOptions", small)
    shown = run("demo").stdout
    assert names("demo") == ["picks.png", "picks.star", "tomogram.mrc", "truth.star"]
    assert len(read_picks("demo/truth.star")["tomogram"]) == 4
    for word in ("voxels of", "windows of", "voxels/s", "precision", "recall", "mean distance"):
        assert word in shown
