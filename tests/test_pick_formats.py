from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.blobs import NamedBlobPicker, blobs, nearest
from tests.mrc_writer import write_mrc
from tomocpt_stream import picker, pipeline
from tomocpt_stream.__main__ import main
from tomocpt_stream.formats import FORMATS, read_picks

if TYPE_CHECKING:
    from tomocpt_stream.frame import Shape

SHAPE: Shape = (40, 48, 56)
CENTRES = np.array([[12.3, 14.0, 15.2], [25.0, 30.4, 40.1]])
TOMOGRAMS = """data_global
loop_
_rlnTomoName
_rlnTomoTiltSeriesPixelSize
_rlnTomoTomogramBinning
_rlnTomoSizeX
_rlnTomoSizeY
_rlnTomoSizeZ
TS_01 2.5 4 224 192 160
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a tomogram and its tomograms.star, and a stand-in for the shipped picker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picker, "load_picker", lambda *_, **__: NamedBlobPicker())
    write_mrc(Path("TS_01_10.00Apx.mrc"), blobs(SHAPE, CENTRES))
    Path("tomograms.star").write_text(TOMOGRAMS)


def pick(*words: str) -> Result:
    arguments = ["pick", "TS_01_10.00Apx.mrc", "--diameter", "80", "--no-picture", *words]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.mark.parametrize("kind", [name for name, kind in FORMATS.items() if kind.writes])
def test_picks_are_written_in_every_format_and_read_back(kind: str) -> None:
    found = pick("--format", kind, "--output", "out/", "--tomograms", "tomograms.star", "--particle", "ribo")
    assert found.exit_code == 0, found.output
    path = Path("out") if FORMATS[kind].project else Path("out", f"TS_01_10.00Apx{FORMATS[kind].suffix}")
    (table,) = read_picks(
        path, format=kind, voxel_size=10.0, shape=SHAPE, tomograms="tomograms.star"
    ).values()
    assert nearest(table.zyx, CENTRES).max() < 0.3
    assert (np.diff(table.score) <= 0).all()
    assert 0.3 < table.score.min() < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "relion4"], "--pixel-size"),
        (["--format", "relion5", "--tomograms", "other.star"], "TS_07"),
        (["--format", "copick", "--particle", "a_b"], "a_b"),
        (["--format", "warp", "--name-pattern", "run_{}"], "does not fit"),
    ],
)
def test_what_could_not_be_written_is_refused_before_anything_is_picked(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    Path("other.star").write_text(TOMOGRAMS.replace("TS_01", "TS_07"))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("picked")

    monkeypatch.setattr(pipeline, "pick", never)
    found = pick("--output", "out/", *words)
    assert found.exit_code == 1
    assert message in found.output
    assert not Path("out").exists()


def test_a_file_of_one_tomogram_does_not_take_two() -> None:
    write_mrc(Path("b.mrc"), blobs(SHAPE, CENTRES))
    found = pick("b.mrc", "--format", "imod", "--output", "all.mod")
    assert found.exit_code == 1
    assert "a .mod file holds one tomogram" in found.output
    assert pick("--format", "imod", "--output", "one.mod").exit_code == 0
    assert len(read_picks("one.mod")["TS_01_10.00Apx"]) == 2


def test_the_command_of_the_next_program_is_printed() -> None:
    found = pick("--format", "warp", "--output", "all.star")
    assert "next:\n  WarpTools ts_export_particles" in found.output
    assert "--input_star all.star --coords_angpix 10 " in found.output
    write_mrc(Path("TS_02.mrc"), blobs(SHAPE, CENTRES))
    found = pick("TS_02.mrc", "--format", "relion5", "--output", "out/", "--pixel-size", "2.5")
    assert "next, for each file:\n  relion_tomo_subtomo --p out/TS_01_10.00Apx.star" in found.output
    assert "next" not in pick("--format", "csv", "--output", "all.csv").output


def test_the_pixel_size_that_a_file_says_is_filled_in() -> None:
    found = pick("--format", "relion5", "--output", "all.star", "--tomograms", "tomograms.star")
    assert "--t tomograms.star " in found.output
    assert " --b 128 --crop 64 --bin 1 " in found.output
    Path("two.star").write_text(TOMOGRAMS + "TS_02 3.0 4 224 192 160\n")
    found = pick("--format", "relion5", "--output", "all.star", "--tomograms", "two.star")
    assert " --bin <binning> " in found.output
