from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_picks, write_picks
from tomocpt_stream.formats.asked import Asked
from tomocpt_stream.formats.extents import Listed, tomogram_extents
from tomocpt_stream.formats.series_names import series_name
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = (
    "<Settings><Import><Param Name='PixelSize' Value='1.35'/><Param Name='BinTimes' Value='1'/></Import>"
    "<Tomo><Param Name='DimensionsX' Value='4000'/><Param Name='DimensionsY' Value='3996'/>"
    "<Param Name='DimensionsZ' Value='1200'/></Tomo></Settings>"
)


def _picks(name: str) -> Picks:
    return Picks(np.array([[25.0, 50, 100]]), np.ones(1, np.float32), voxel_size=10.0, tomogram=name)


def _project(folder: Path, *names: str) -> tuple[Path, Path]:
    """Make the settings and the tomostars of a Warp project."""
    settings, tomostars = folder / "warp_tiltseries.settings", folder / "tomostar"
    settings.write_bytes(b"\xef\xbb\xbf<?xml version='1.0' encoding='utf-8'?>\n" + SETTINGS.encode())
    tomostars.mkdir()
    for name in names:
        (tomostars / f"{name}.tomostar").write_text("data_\n\nloop_\n_wrpMovieName #1\na.tif\n")
    return settings, tomostars


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("TS_01", "TS_01"),
        ("TS_01_10.00Apx", "TS_01"),
        ("TS_01_8Apx.mrc", "TS_01"),
        ("rec_TS_01", "TS_01"),
        ("rec_TS_01_13.47Apx.mrc.gz", "TS_01"),
        ("TS_01_Vol", "TS_01"),
        ("TS_01_Vol.rec", "TS_01"),
        ("TS_01.tomostar", "TS_01"),
        ("24aug01b_Position_20_1_2", "24aug01b_Position_20_1_2"),
        ("TS_01_Apx", "TS_01_Apx"),
        ("record_1", "record_1"),
        ("rec_", "rec_"),
        ("Volume", "Volume"),
    ],
)
def test_what_programs_add_is_taken_off(name: str, series: str) -> None:
    assert series_name(name) == series


@given(st.text(max_size=40))
def test_a_series_has_a_name_that_stays(name: str) -> None:
    series = series_name(name)
    assert series_name(series) == series
    assert bool(series) == bool(name)
    assert series in name


def test_patterns_say_where_the_series_is() -> None:
    assert series_name("bin4_TS_01_ali_x", "bin4_{}_ali*") == "TS_01"
    assert series_name("TS_01_bin4", "{}_*") == "TS_01"
    assert series_name("a.b(c)", "{}(c)") == "a.b"
    assert series_name("run7_rec_TS_01_bin4_bin4", "*_rec_{}_bin*") == "TS_01_bin4"
    with pytest.raises(FormatError, match=r"'TS_01' does not fit the name pattern 'x\{\}'"):
        series_name("TS_01", "x{}")
    with pytest.raises(FormatError, match="does not fit"):
        series_name("aba", "ab{}ba")
    for pattern in ("TS", "{}{}"):
        with pytest.raises(FormatError, match="once, for the tilt series' name"):
            series_name("TS_01", pattern)
    with pytest.raises(FormatError, match="does not fit"):
        series_name("a" * 100_000, "*a" * 1000 + "{}*b*")


def test_settings_give_the_sizes_of_all_tomograms_and_tomostars_their_names(tmp_path: Path) -> None:
    settings, tomostars = _project(tmp_path, "TS_01", "TS_02")
    every = tomogram_extents(settings)
    assert (dict(every), every.every.pixel_size, every.series) == ({}, 1.35, False)
    both = tomogram_extents([settings, tomostars])
    assert list(both) == ["TS_01", "TS_02"]
    assert both.series
    assert both["TS_02"].angstrom is not None
    np.testing.assert_allclose(both["TS_02"].angstrom, [5400, 5394.6, 1620])
    assert list(tomogram_extents(tomostars / "TS_02.tomostar")) == ["TS_02"]


@pytest.mark.parametrize("dialect", ["relion5", "relion4", "warp"])
def test_picks_are_written_under_the_name_of_their_tilt_series(tmp_path: Path, dialect: str) -> None:
    settings, tomostars = _project(tmp_path, "TS_01", "TS_01_Vol")
    path = tmp_path / "p.star"
    write_picks(_picks("rec_TS_01_10.00Apx"), path, format=dialect, tomograms=[settings, tomostars])
    found = read_picks(path, tomograms=[settings, tomostars], voxel_size=10.0)
    assert list(found) == ["TS_01"]
    np.testing.assert_allclose(found["TS_01"].zyx, [[25, 50, 100]], atol=1e-5)
    with pytest.raises(FormatError, match="tomogram 'TS_09' is not among those given: TS_01, TS_01_Vol"):
        write_picks(_picks("TS_09"), path, format=dialect, tomograms=[settings, tomostars])
    (tmp_path / "x").mkdir()
    other = _project(tmp_path / "x", "TS_09")
    with pytest.raises(FormatError, match="'TS_01' is not among those given: TS_09"):
        read_picks(path, tomograms=other, voxel_size=10.0)


def test_names_that_nothing_takes_off_need_a_pattern(tmp_path: Path) -> None:
    _, tomostars = _project(tmp_path, "TS_01")
    path = tmp_path / "p.star"
    with pytest.raises(FormatError, match="--name-pattern"):
        write_picks(_picks("TS_01_bin8_ali"), path, format="warp", tomograms=tomostars)
    write_picks(_picks("TS_01_bin8_ali"), path, format="warp", tomograms=tomostars, name_pattern="{}_bin8_*")
    assert list(read_picks(path)) == ["TS_01"]


@pytest.mark.parametrize("dialect", ["relion5", "warp"])
def test_two_tomograms_of_one_series_are_an_error(tmp_path: Path, dialect: str) -> None:
    settings, _ = _project(tmp_path)
    twins = [_picks("TS_01_10.00Apx"), _picks("TS_01_5.00Apx")]
    with pytest.raises(FormatError, match=r"'TS_01_10\.00Apx' and 'TS_01_5\.00Apx', both of .* 'TS_01'"):
        write_picks(twins, tmp_path / "p.star", format=dialect, tomograms=settings)
    write_picks(twins, tmp_path / "p.star", format="relion31", tomograms=settings)
    assert len(read_picks(tmp_path / "p.star")) == 2


def test_a_name_that_may_be_several_listed_ones_is_an_error() -> None:
    asked = Asked(tomograms=Listed({"TS_01_10.00Apx": tomogram_extents({"a": ((1, 2, 3), 4.0)})["a"]}))
    assert asked.known("TS_01") is not None
    twice = Listed(dict.fromkeys(["TS_01_10.00Apx", "TS_01_5.00Apx"], asked.of("TS_01")))
    with pytest.raises(FormatError, match=r"'TS_01' may be any of TS_01_10\.00Apx, TS_01_5\.00Apx"):
        Asked(tomograms=twice).known("TS_01")
    assert Asked(tomograms=twice).known("TS_01_5.00Apx") is not None


def test_two_folders_with_one_name_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    header = "data_\nloop_\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n_rlnMicrographName\n"
    path.write_text(header + "1 2 3 a/TS_01.mrc\n1 2 3 b/TS_01.mrc\n")
    with pytest.raises(FormatError, match=r"a/TS_01\.mrc and b/TS_01\.mrc"):
        read_picks(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SETTINGS.replace("DimensionsZ", "Dimension"), "without DimensionsZ"),
        (SETTINGS.replace("'1.35'", "'0'"), "PixelSize '0'"),
        (SETTINGS.replace("'1.35'", "'nan'"), "PixelSize 'nan'"),
        (SETTINGS[:100], "cannot be read as settings of Warp"),
        ("<!DOCTYPE s [<!ENTITY a 'b'>]>" + SETTINGS, "declares a document type"),
        ("<?xml version='1.0' encoding='x'?>" + SETTINGS, "cannot be read as settings of Warp"),
        ("", "cannot be read as settings of Warp"),
        (" " * (1 << 20) + SETTINGS, "more than 1048576 bytes"),
    ],
)
def test_bad_settings_are_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.settings"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        tomogram_extents(path)


def test_settings_may_be_in_utf_16(tmp_path: Path) -> None:
    path = tmp_path / "wide.settings"
    path.write_bytes(("<?xml version='1.0' encoding='utf-16'?><!-- Warp -->" + SETTINGS).encode("utf-16"))
    assert tomogram_extents(path).every.pixel_size == 1.35
    path.write_bytes(("<?xml version='1.0' encoding='utf-16'?><!DOCTYPE s>" + SETTINGS).encode("utf-16"))
    with pytest.raises(FormatError, match="document type"):
        tomogram_extents(path)


def test_sources_of_sizes_that_are_none_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no file"):
        tomogram_extents(tmp_path / "absent.star")
    with pytest.raises(FormatError, match=r"no \*\.tomostar in"):
        tomogram_extents(tmp_path)
    header = "data_global\n\nloop_\n_rlnTomoName\n_rlnTomoTiltSeriesPixelSize\n_rlnTomoSizeX\n_rlnTomoSizeY\n"
    path = tmp_path / "tomograms.star"
    path.write_text(header + "_rlnTomoSizeZ\nTS_01 1.35 4000 4000 1200\nTS_01 1.35 4000 4000 1200\n")
    with pytest.raises(FormatError, match="2 rows for 1 tomograms"):
        tomogram_extents(path)
    path.write_text(header + "_rlnTomoSizeZ\nTS_01 1.35 4000 -4 1200\n")
    with pytest.raises(FormatError, match=r"row 1 .* rlnTomoSizeY -4"):
        tomogram_extents(path)
    path.write_text(header + "_rlnTomoSizeZ\n_rlnTomoTomogramBinning\nTS_01 1.35 4000 4000 1200 None\n")
    assert tomogram_extents(path)["TS_01"].voxel_size is None
