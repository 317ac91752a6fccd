from __future__ import annotations

import runpy
import sys
import types
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import imodmodel
import numpy as np
import pytest
from click.testing import CliRunner

from tests.mrc_writer import write_mrc
from tomocpt_stream.__main__ import main
from tomocpt_stream.errors import FormatError, PlanError
from tomocpt_stream.formats import read_picks, write_picks
from tomocpt_stream.picks import Picks
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.viewers import VIEWERS, picks_of, write_view

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (20, 30, 40)
SIZE = 8.0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "TS 01.mrc"
    write_mrc(path, np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), voxel=SIZE)
    return path


def table(n: int = 5, **changes: Any) -> Picks:
    rng = np.random.default_rng(1)
    picks = Picks(rng.uniform(0, SHAPE, (n, 3)), rng.random(n), None, SIZE, "TS 01", SHAPE)  # type: ignore[arg-type]
    return replace(picks, **changes)


def test_markers_lie_where_the_voxels_are_and_have_their_scores(source: Path, tmp_path: Path) -> None:
    picks = table()
    view = write_view(open_tomogram(source), picks, tmp_path / "out", viewer="chimerax", diameter=100)
    markers, script = view.files
    rows = ET.parse(markers).getroot().findall("marker")
    found = np.array([[float(row.attrib[axis]) for axis in "zyx"] for row in rows])
    np.testing.assert_allclose(found / SIZE, picks.zyx, atol=1e-3)
    np.testing.assert_allclose([float(row.attrib["note"]) for row in rows], picks.score, rtol=1e-5)
    brightness = [sum(float(row.attrib[part]) for part in "rgb") for row in rows]
    assert np.argmax(brightness) == np.argmax(picks.score)
    assert {row.attrib["radius"] for row in rows} == {"50"}
    lines = script.read_text().splitlines()
    assert f'open "{source}" format mrc' in lines
    # A header's origin would move the tomogram away from its picks.
    assert "volume #1 voxelSize 8 originIndex 0,0,0" in lines
    assert f'open "{markers}"' in lines
    assert view.command == f"chimerax '{script}'" or view.command == f"chimerax {script}"


def test_no_picks_are_shown_too(source: Path, tmp_path: Path) -> None:
    for viewer in VIEWERS:
        view = write_view(open_tomogram(source), table(0), tmp_path, viewer=viewer, diameter=100)
        assert all(path.is_file() for path in view.files)


def test_the_model_for_3dmod_has_half_a_voxel_and_the_size_of_the_particle(
    source: Path, tmp_path: Path
) -> None:
    picks = table()
    view = write_view(open_tomogram(source), picks, tmp_path, viewer="imod", diameter=100)
    (model,) = view.files
    points = imodmodel.read(model)
    np.testing.assert_allclose(points[["z", "y", "x"]] - [0, 0.5, 0.5], picks.zyx, atol=1e-4)
    assert imodmodel.ImodModel.from_file(model).objects[0].header.pdrawsize == round(50 / SIZE)
    assert view.command == f"3dmod '{source}' {model}"


def test_the_script_for_napari_shows_what_it_should(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}

    class Viewer:
        def __init__(self, **settings: Any) -> None:
            shown["viewer"] = settings

        def add_image(self, data: Any, **settings: Any) -> None:
            shown["image"] = settings | {"data": data.compute()}

        def add_points(self, data: Any = None, **settings: Any) -> None:
            shown["points"] = settings | {"data": data}

    napari: Any = types.ModuleType("napari")
    napari.Viewer = Viewer
    napari.run = lambda: shown.setdefault("ran", True)
    monkeypatch.setitem(sys.modules, "napari", napari)
    picks, tomogram = table(), open_tomogram(source)
    view = write_view(tomogram, picks, tmp_path / "out", viewer="napari", diameter=100)
    runpy.run_path(str(view.files[1]), run_name="__main__")
    np.testing.assert_array_equal(shown["image"]["data"], tomogram.to_dask().compute())
    np.testing.assert_allclose(shown["points"]["data"], picks.zyx, atol=1e-4)
    np.testing.assert_allclose(shown["points"]["features"]["score"], picks.score, rtol=1e-5)
    assert shown["image"]["scale"] == shown["points"]["scale"] == (SIZE,) * 3
    assert shown["points"]["size"] == 100 / SIZE
    low, high = shown["image"]["contrast_limits"]
    assert -3.5 < low < -1.5
    assert 1.5 < high < 3.5
    assert shown["ran"]
    view = write_view(tomogram, table(0), tmp_path / "none", viewer="napari", diameter=100)
    runpy.run_path(str(view.files[1]), run_name="__main__")
    assert shown["points"]["data"] is None or len(shown["points"]["data"]) == 0
    assert shown["points"]["name"] == "picks"


@pytest.mark.parametrize("viewer", VIEWERS)
def test_a_hostile_name_is_no_code_and_no_path(source: Path, tmp_path: Path, viewer: Any) -> None:
    name = '../"""\nimport os\n#" ; exit \' <a>'
    tomogram = open_tomogram(source, name=name)
    view = write_view(tomogram, table(tomogram="x"), tmp_path / "out", viewer=viewer, diameter=100)
    for path in view.files:
        assert path.parent == tmp_path / "out"
        if path.suffix == ".py":
            compile(path.read_text(), "script", "exec")
        if path.suffix in (".py", ".cxc"):
            assert "import os\n" not in path.read_text()
            assert "; exit" not in path.read_text().replace(repr(name), "")


def test_what_a_program_cannot_open_is_refused(source: Path, tmp_path: Path) -> None:
    volume = open_tomogram(np.zeros(SHAPE, np.float32), voxel_size=SIZE)
    for viewer in ("imod", "chimerax"):
        with pytest.raises(PlanError, match="does not open"):
            write_view(volume, table(), tmp_path, viewer=viewer, diameter=100)
    with pytest.raises(PlanError, match="viewer 'paint'"):
        write_view(open_tomogram(source), table(), tmp_path, viewer="paint", diameter=100)  # type: ignore[arg-type]
    turned = open_tomogram(source, beam_axis="y")
    with pytest.raises(PlanError, match="beam_axis='y'"):
        write_view(turned, table(), tmp_path, viewer="imod", diameter=100)


def test_picks_of_one_table_are_those_of_the_tomogram(source: Path) -> None:
    tomogram = open_tomogram(source)
    assert picks_of({"other": table()}, tomogram).tomogram == "TS 01"
    both = {"TS 01": table(3), "TS 02": table(4)}
    assert len(picks_of(both, tomogram)) == 3
    with pytest.raises(FormatError, match="picks of TS 02, TS 03, and none of TS 01"):
        picks_of({"TS 02": table(), "TS 03": table()}, tomogram)


def test_picks_of_other_voxels_are_brought_over(source: Path) -> None:
    tomogram = open_tomogram(source)
    coarse = table(zyx=table().zyx / 2, voxel_size=2 * SIZE)
    with pytest.warns(UserWarning, match=r"voxels of 16 Å are brought over to voxels of 8 Å"):
        found = picks_of({"TS 01": coarse}, tomogram)
    np.testing.assert_allclose(found.zyx, table().zyx)
    assert (found.voxel_size, found.shape) == (SIZE, SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(picks_of({"": table(voxel_size=None)}, tomogram).zyx, table().zyx)


@pytest.mark.parametrize(("viewer", "name"), [("napari", "TS_01_picks.csv"), ("imod", "TS_01_picks.mod")])
def test_edited_picks_are_never_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, viewer: str, name: str
) -> None:
    """Programs save what somebody edited under the name that they opened."""
    monkeypatch.chdir(tmp_path)
    write_picks(table(), "picks.csv")
    points = tmp_path / "view" / name

    def view(picks: str, *more: str) -> Any:
        words = ["view", str(source), picks, "--in", viewer, "--diameter", "100", *more]
        return CliRunner().invoke(main, words, catch_exceptions=False)

    assert view("picks.csv").exit_code == 0
    write_picks(table(3), points, format=viewer)
    edited = points.read_bytes()
    refused = view(f"view/{name}", "--threshold", "2")
    assert refused.exit_code == 1
    assert "is an input" in refused.output
    assert points.read_bytes() == edited
    for _ in range(2):
        assert view("picks.csv").exit_code == 0
        assert len(read_picks(points)["TS 01"]) == 5
        assert points.with_name(f"{name}~").read_bytes() == edited


def test_one_kind_of_several_is_shown(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_picks([table(5, particle="a"), table(3, particle="b")], "picks.csv")
    words = ["view", str(source), "picks.csv", "--in", "imod", "--diameter", "100"]
    assert "--particle" in CliRunner().invoke(main, words).output
    result = CliRunner().invoke(main, [*words, "--particle", "b"], catch_exceptions=False)
    assert "3 picks -> " in result.output


@pytest.mark.parametrize("kind", ["relion31", "relion5"])
def test_the_command_reads_any_star_and_prints_how_to_open_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    picks = table()
    write_picks(picks, "picks.star", format=kind)
    arguments = ["view", str(source), "picks.star", "--in", "chimerax", "--diameter", "100"]
    result = CliRunner().invoke(main, [*arguments, "--threshold", "0.4"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "chimerax view/TS_01_view.cxc"
    rows = ET.parse("view/TS_01_picks.cmm").getroot().findall("marker")
    assert len(rows) == (picks.score > 0.4).sum() < len(picks)
    found = read_picks("picks.star", voxel_size=SIZE, shape=SHAPE)["TS 01"].above(0.4)
    assert float(rows[0].attrib["x"]) == pytest.approx(found.zyx[0, 2] * SIZE, abs=1e-2)


def test_edited_picks_get_their_scores_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picks = table()
    write_picks(picks, "picks.star")
    kept = picks.zyx[[4, 0, 2]]
    moved = np.concatenate([kept, [[1.0, 2.0, 3.0]]])
    # As napari saves an edited layer: other rows, features of the last row for new points.
    rows = [f"{i},{z},{y},{x},0.9" for i, (z, y, x) in enumerate(moved)]
    (tmp_path / "edited.csv").write_text("\n".join(["index,axis-0,axis-1,axis-2,score", *rows]))
    words = ["curate", "picks.star", "edited.csv", "curated.csv", "--edited-format", "napari"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "TS 01: 3 kept, 1 added, 2 removed" in result.output
    for row in (1, 3):
        assert f"(score {picks.score[row]:.3g})" in result.output
    found = read_picks("curated.csv")["TS 01"]
    np.testing.assert_allclose(found.zyx, moved, atol=1e-4)
    np.testing.assert_allclose(found.score, [*picks.score[[4, 0, 2]], 1], rtol=1e-5)
    words = ["curate", "picks.star", "edited.csv", "edited.csv", "--edited-format", "napari"]
    assert "is an input" in CliRunner().invoke(main, words).output
    (tmp_path / "edited.csv").write_text("index,axis-0,axis-1,axis-2,score\n")
    words = ["curate", "picks.star", "edited.csv", "none.csv", "--edited-format", "napari"]
    assert "TS 01: 0 kept, 0 added, 5 removed" in CliRunner().invoke(main, words).output


def test_picks_that_were_not_shown_were_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picks = table()
    write_picks([picks, table(tomogram="b")], "picks.star")
    write_picks(picks.above(0.4), "edited.csv")
    words = ["curate", "picks.star", "edited.csv", "curated.csv", "--threshold", "0.4"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "0 added, 0 removed" in result.output
    assert list(read_picks("curated.csv")) == ["TS 01"]
    write_picks(table(tomogram="c"), "other.csv")
    words = ["curate", "picks.star", "other.csv", "curated.csv"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "has picks of c, and picks.star of TS 01, b" in result.output
