from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.blobs import BlobPicker, blobs
from tests.tables import SHAPE, VOXEL_SIZE, some_picks
from tomocpt_stream import PickOptions, open_tomogram, pick
from tomocpt_stream.__main__ import main
from tomocpt_stream.formats import FORMATS, read_kinds, read_picks, write_picks
from tomocpt_stream.phantom import write_mrc

if TYPE_CHECKING:
    from tests.buckets import S3


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["convert", *map(str, words)])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_picks_go_from_star_to_a_model_and_on_to_copick() -> None:
    picks = some_picks(20, turned=True)
    write_picks(picks, "a.star")
    assert "20 picks of 1 tomogram -> a.mod" in run("a.star", "a.mod").output
    assert "9 picks of 1 tomogram" in run("a.mod", "project", "--to", "copick", "--threshold", 0.55).output
    found = read_picks("project", format="copick")["TS_01"]
    np.testing.assert_allclose(found.zyx, picks.above(0.55).zyx, atol=1e-3)
    assert found.rotations is not None


def test_sizes_come_from_options_or_from_a_file() -> None:
    picks = some_picks(5, shape=None)
    write_picks(picks, "a.star")
    assert "size" in run("a.star", "b.star", "--to", "relion5", code=1).output
    run("a.star", "b.star", "--to", "relion5", "--shape", *SHAPE)
    found = read_picks("b.star", format="relion5", voxel_size=VOXEL_SIZE, shape=SHAPE)["TS_01"]
    np.testing.assert_allclose(found.zyx, picks.zyx, atol=1e-4)
    run(
        "b.star",
        "c.star",
        "--to",
        "relion4",
        "--shape",
        *SHAPE,
        "--voxel-size",
        VOXEL_SIZE,
        "--pixel-size",
        2,
    )
    found = read_picks("c.star", format="relion4", voxel_size=VOXEL_SIZE, pixel_size=2.0)["TS_01"]
    np.testing.assert_allclose(found.zyx, picks.zyx, atol=1e-4)
    Path("p.csv").write_text("x,y,z\n1,2,3\n")
    assert "units" in run("p.csv", "q.csv", code=1).output
    run("p.csv", "q.csv", "--from", "portal_csv", "--voxel-size", 4)
    assert read_picks("q.csv")["p"].voxel_size == 4


def test_conventions_are_options(shared_data: Path) -> None:
    table = shared_data / "star" / "dynamo_example.tbl"
    assert "base_index" in run(table, "a.csv", code=1).output
    run(table, "a.csv", "--base-index", 1)
    assert sum(map(len, read_picks("a.csv").values())) == 4934
    run(shared_data / "portal" / "in" / "points.mod", "b.coords", "--no-half-voxel", "--voxel-size", 1)
    assert Path("b.coords").read_text().splitlines()[0] == "1.000000 2.000000 3.000000"


def test_picks_come_from_addresses_and_go_there(s3: S3) -> None:
    write_picks(some_picks(3), "a.star")
    keys = {"access_key_id": "test", "secret_access_key": "test", "skip_signature": "false"}
    options = [f"--storage-option={key}={value}" for key, value in s3.options(**keys).items()]
    run("a.star", s3.address("out"), "--to", "coords", *options)
    run(s3.address("out/TS_01.coords"), "b.csv", *options)
    score = read_picks("b.csv")["TS_01"].score
    np.testing.assert_allclose(score, some_picks(3).score, rtol=1e-5)


def test_an_annotation_is_read_at_an_address_too(s3: S3) -> None:
    options = s3.options(access_key_id="test", secret_access_key="test", skip_signature="false")
    write_picks(some_picks(4), s3.address("a.ndjson"), storage_options=options)
    (found,) = read_picks(s3.address("a.ndjson"), storage_options=options).values()
    assert (found.voxel_size, found.particle) == (VOXEL_SIZE, "ribosome")


def test_one_kind_of_several() -> None:
    write_picks([some_picks(3), some_picks(2, particle="b")], "a.csv")
    run("a.csv", "out", "--to", "ndjson")
    assert [len(table) for table in read_kinds("out", format="ndjson")] == [2, 3]
    run("a.csv", "b.ndjson", "--particle", "b")
    assert len(read_picks("b.ndjson")["TS_01"]) == 2
    Path("classes.star").write_text(
        "data_particles\n\nloop_\n_rlnMicrographName #1\n_rlnCoordinateX #2\n_rlnCoordinateY #3\n"
        "_rlnCoordinateZ #4\n_rlnClassNumber #5\nTS_1 10 20 30 3\nTS_1 40 50 60 5\n"
    )
    run("classes.star", "one.csv", "--particle", "5", "--voxel-size", "10")
    (kept,) = read_kinds("one.csv")
    assert (kept.particle, kept.zyx.tolist()) == ("5", [[60, 50, 40]])
    assert "no 'c' among 'b', 'ribosome'" in run("a.csv", "c.ndjson", "--particle", "c", code=2).output
    assert "2 tables of picks" in run("a.csv", "c.ndjson", code=1).output
    assert not Path("c.ndjson").exists()


def test_an_input_is_not_overwritten() -> None:
    write_picks(some_picks(2), "a.csv")
    before = Path("a.csv").read_bytes()
    assert "is an input" in run("a.csv", "a.csv", "--to", "napari", code=1).output
    assert Path("a.csv").read_bytes() == before
    assert "no file nothing.star" in run("nothing.star", "b.star", code=1).output


TOMOGRAMS = """data_global

loop_
_rlnTomoName
_rlnTomoTiltSeriesPixelSize
_rlnTomoSizeX
_rlnTomoSizeY
_rlnTomoSizeZ
TS_01 1.35 4000 4000 1200
"""


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["a.json", "a.ndjson"], "a.json"),  # whose annotation has that name
        (["a.csv", "t.star", "--to", "relion5", "--tomograms", "t.star"], "t.star"),
        (["TS_01.coords", ".", "--to", "coords", "--threshold", "0.5"], "TS_01.coords"),
        (["TS_01.coords.scores.csv", "TS_01.coords"], "TS_01.coords.scores.csv"),
        (["TS_01.coords", "TS_01.coords.scores.csv", "--threshold", "0.5"], "TS_01.coords.scores.csv"),
        (["b.ndjson", "b.json"], "b.json"),  # the annotation that is read beside the points
    ],
)
def test_no_file_that_is_read_is_written(words: list[str], kept: str) -> None:
    for name in ("a.csv", "a.json", "b.ndjson", "TS_01.coords"):
        write_picks(some_picks(9), name)
    Path("t.star").write_text(TOMOGRAMS)
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    message = run(*words, code=1).output
    assert f"{kept} is an input" in message
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize("kind", [name for name, one in FORMATS.items() if one.folder and one.writes])
def test_the_folder_one_is_in_may_be_the_output(place: Path, kind: str) -> None:
    """It has no name of its own: files must not land in the root of the disk."""
    write_picks(some_picks(3), "a.tsv")
    (place / "inner").mkdir()
    for folder in (".", "inner/.."):
        run("a.tsv", folder, "--to", kind)
        found = read_picks(place, format=kind, voxel_size=VOXEL_SIZE, shape=SHAPE)
        assert len(found["TS_01"]) == 3
    assert "with a name" in run("a.tsv", "/", "--to", kind, code=1).output


def test_a_folder_is_no_file_and_a_file_no_folder() -> None:
    write_picks(some_picks(3), "a.csv")
    Path("all").mkdir()
    Path("old.json").write_text("kept")
    assert "all, which is a folder" in run("a.csv", "all", "--to", "relion31", code=1).output
    assert "old.json, which is a file" in run("a.csv", "old.json", "--to", "imod", code=1).output
    assert Path("old.json").read_text() == "kept"
    assert not list(Path("all").iterdir())


def test_tomostars_may_lie_where_the_picks_go() -> None:
    write_picks(some_picks(3), "a.csv")
    Path("TS_01.tomostar").touch()
    run("a.csv", "b.star", "--to", "warp", "--tomograms", ".")
    assert set(read_picks("b.star", format="warp")) == {"TS_01"}


def test_kinds_that_star_would_mix_up_are_refused() -> None:
    write_picks([some_picks(3), some_picks(2, seed=1, particle="b")], "a.csv")
    assert "2 kinds of particles" in (message := run("a.csv", "a.star", code=1).output)
    assert "--particle" in message
    run("a.csv", "a.star", "--particle", "b")
    assert len(read_picks("a.star")["TS_01"]) == 2


def test_what_is_missing_is_asked_for_by_its_option() -> None:
    write_picks(some_picks(3, shape=None, voxel_size=None), "a.csv")
    write_picks(some_picks(3, shape=None), "b.csv")
    write_picks(some_picks(3), "c.star", format="relion5")
    for words, option in (
        (["a.csv", "a.star"], "--voxel-size"),
        (["a.csv", "a.json"], "--voxel-size"),
        (["b.csv", "b.star", "--to", "relion5"], "--shape"),
        (["b.csv", "b.star", "--to", "relion4"], "--pixel-size"),
        (["c.star", "c.csv"], "--voxel-size"),
        (["c.star", "c.csv", "--voxel-size", "10"], "--shape"),
        (["a.csv", "a.what"], "--to"),
        (["a.csv~", "a.star"], "--from"),
    ):
        Path("a.csv~").touch()
        assert option in run(*words, code=1).output


def test_a_heat_map_becomes_mrc(tmp_path: Path) -> None:
    centres = np.array([[8.0, 10.0, 9.0], [20.0, 30.0, 33.0]])
    write_mrc("TS.mrc", blobs((30, 50, 44), centres), 10.0)
    picks = pick(
        open_tomogram("TS.mrc"),
        BlobPicker(),
        PickOptions(diameter=160, contrast="dark"),
        keep_heatmap="map.zarr",
    )
    assert len(picks) == 2
    assert "heat map of TS -> own.mrc" in run("map.zarr", "own.mrc").output
    run("map.zarr", "like.mrc", "--like", "TS.mrc")
    with mrcfile.open("own.mrc") as own, mrcfile.open("like.mrc") as like:
        assert like.data.shape == (30, 50, 44)
        best = np.array(np.unravel_index(own.data.argmax(), own.data.shape))[::-1]
        step, origin = own.voxel_size.x, np.array(own.header.origin.tolist())
        apart = np.abs(best * step + origin - picks.angstrom()).max(axis=1).min()
        assert apart <= step / 2 + 0.1
        there = tuple(np.rint(picks.zyx[0]).astype(int))
        assert like.data[there] > 0.8 * like.data.max()
    write_mrc("other.mrc", np.zeros((8, 8, 8), np.float32) + np.arange(8, dtype=np.float32), 10.0)
    assert "the tomogram of the map" in run("map.zarr", "x.mrc", "--like", "other.mrc", code=1).output
    assert "on a disk" in run("map.zarr", "s3://bucket/x.mrc", code=2).output
    assert "--like is for a heat map" in run("a.csv", "b.csv", "--like", "TS.mrc", code=2).output
