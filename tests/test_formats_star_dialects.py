from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import starfile
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_kinds, read_picks, write_picks
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from pathlib import Path

WRITTEN = ["relion31", "relion4", "relion5", "relion5-picker", "warp"]
SHAPE = (184, 630, 631)
PIXEL = 1.35
SIZES = {"TS_01": (SHAPE, 10.012)}


def _picks(n: int = 20, **changes: Any) -> Picks:
    rng = np.random.default_rng(n)
    picks = Picks(
        zyx=rng.uniform(0, SHAPE, (n, 3)),
        score=rng.random(n).astype(np.float32),
        rotations=Rotation.random(n, rng=rng).as_matrix(),
        voxel_size=10.012,
        tomogram="TS_01",
        shape=SHAPE,
    )
    return replace(picks, **changes)


def _one(xyz: tuple[float, float, float], **changes: Any) -> Picks:
    return Picks(np.array([xyz[::-1]]), np.ones(1, np.float32), tomogram="TS_01", **changes)


def _written(path: Path) -> Any:
    """Return the particles of a file as the field's own reader has them."""
    return starfile.read(path, always_dict=True)["particles"]


def _tomograms_star(folder: Path) -> Path:
    path = folder / "tomograms.star"
    path.write_text(
        "data_global\n\nloop_\n_rlnTomoName #1\n_rlnTomoTiltSeriesPixelSize #2\n_rlnTomoTomogramBinning #3\n"
        "_rlnTomoSizeX #4\n_rlnTomoSizeY #5\n_rlnTomoSizeZ #6\nTS_01 1.35 7.407407407 4000 3996 1200\n"
    )
    return path


@pytest.mark.parametrize("mean_binned", [False, True])
@pytest.mark.parametrize("second", WRITTEN)
@pytest.mark.parametrize("first", WRITTEN)
def test_picks_go_through_every_pair_of_dialects(
    tmp_path: Path, first: str, second: str, mean_binned: bool
) -> None:
    options: dict[str, Any] = {"mean_binned": mean_binned, "tomograms": SIZES}
    picks, path = _picks(), tmp_path / "picks.star"
    for dialect in (first, second):
        write_picks(picks, path, format=dialect, pixel_size=PIXEL, **options)
        own = None if dialect in ("warp", "relion31") else PIXEL
        assert list(_written(path).columns[:3]) == [
            f"{stem}{axis}{end}"
            for axis in "XYZ"
            for stem, end in [("rlnCenteredCoordinate", "Angst") if "5" in dialect else ("rlnCoordinate", "")]
        ]
        if mean_binned and dialect == "warp":
            options["tomograms"] = _warp_sizes(tmp_path)
        picks = replace(read_picks(path, pixel_size=own, **options)["TS_01"], shape=SHAPE)
        options["tomograms"] = SIZES
    expected = _picks()
    assert expected.rotations is not None
    assert picks.rotations is not None
    np.testing.assert_allclose(picks.zyx, expected.zyx, atol=1e-5, rtol=0)
    np.testing.assert_allclose(picks.rotations, expected.rotations, atol=1e-6)
    np.testing.assert_allclose(picks.score, expected.score, rtol=1e-5)
    assert picks.voxel_size == 10.012


def _warp_sizes(folder: Path) -> Path:
    path = folder / "warp_tiltseries.settings"
    sides = "".join(f'<Param Name="Dimensions{axis}" Value="4680"/>' for axis in "XYZ")
    pixel = f'<Param Name="PixelSize" Value="{PIXEL}"/>'
    path.write_text(f"<Settings><Import>{pixel}</Import><Tomo>{sides}</Tomo></Settings>")
    return path


def test_relion_4_counts_unbinned_pixels_from_the_corner(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    write_picks(_one((10, 20, 30), voxel_size=8.0), path, format="relion4", pixel_size=2.0)
    row = _written(path).iloc[0]
    assert [row[f"rlnCoordinate{axis}"] for axis in "XYZ"] == [40.0, 80.0, 120.0]
    assert row["rlnTomoName"] == "TS_01"
    assert starfile.read(path)["optics"]["rlnTomoTiltSeriesPixelSize"].tolist() == [2.0]
    assert read_picks(path, voxel_size=8.0)["TS_01"].zyx.tolist() == [[30.0, 20.0, 10.0]]
    write_picks(_one((10, 20, 30), voxel_size=8.0), path, format="relion4", pixel_size=2.0, mean_binned=True)
    assert _written(path)["rlnCoordinateX"].tolist() == [41.5]
    with pytest.raises(FormatError, match="unbinned pixel size of tomogram TS_01"):
        write_picks(_one((10, 20, 30), voxel_size=8.0), path, format="relion4")
    with pytest.raises(FormatError, match="voxel size of tomogram TS_01"):
        read_picks(path)


def test_relion_4_asks_for_the_pixel_size_that_a_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    header = "data_\nloop_\n_rlnTomoName\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnCoordinateZ\n"
    path.write_text(header + "_rlnOriginXAngst\n_rlnOriginYAngst\n_rlnOriginZAngst\nTS_01 40 80 120 8 0 -8\n")
    with pytest.raises(FormatError, match=r'beyond its \(30, 30, 30\) voxels.*"relion4" for unbinned pixels'):
        read_picks(path, voxel_size=8.0, shape=(30, 30, 30))
    with pytest.raises(FormatError, match=r"unbinned pixel size of tomogram TS_01.*pass pixel_size="):
        read_picks(path, format="relion4", voxel_size=8.0)
    found = read_picks(path, format="relion4", voxel_size=8.0, pixel_size=2.0)["TS_01"]
    assert found.zyx.tolist() == [[31.0, 20.0, 9.0]]
    assert read_picks(path, format="relion4", tomograms=_tomograms_star(tmp_path))["TS_01"].zyx[
        0, 1
    ] == pytest.approx(80 / 7.407407407)


def test_the_two_centres_of_relion_5_differ_by_an_unbinned_pixel(tmp_path: Path) -> None:
    sizes, path = _tomograms_star(tmp_path), tmp_path / "p.star"
    written = {}
    for dialect in ("relion5", "relion5-picker"):
        write_picks(_one((100, 50, 25), voxel_size=10.0), path, format=dialect, tomograms=sizes)
        written[dialect] = _written(path)["rlnCenteredCoordinateXAngst"][0]
        np.testing.assert_allclose(
            read_picks(path, tomograms=sizes, voxel_size=10.0)["TS_01"].zyx, [[25, 50, 100]], atol=1e-6
        )
    assert written["relion5"] == pytest.approx(100 * 10 - 2000 * 1.35)
    assert written["relion5-picker"] == pytest.approx(10 * (100 - 269.865))
    with pytest.raises(FormatError, match="unbinned pixel size"):
        write_picks(_one((1, 2, 3), voxel_size=10.0, shape=SHAPE), path, format="relion5-picker")


def test_warp_is_given_names_of_tomostars_and_one_voxel_size(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    write_picks(_picks(tomogram="TS_01_10.00Apx"), path, format="warp")
    assert set(_written(path)["rlnMicrographName"]) == {"TS_01.tomostar"}
    found = read_picks(path)
    assert list(found) == ["TS_01"]
    assert found["TS_01"].voxel_size == 10.012
    np.testing.assert_allclose(found["TS_01"].zyx, _picks().zyx, atol=1e-6)
    with pytest.raises(FormatError, match=r"10\.012 and of 5\.0 Å.*--coords_angpix"):
        write_picks([_picks(), _picks(tomogram="b", voxel_size=5.0)], path, format="warp")


def test_a_file_says_its_own_dialect_unless_another_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    write_picks(_picks(), path, format="relion5-picker", pixel_size=PIXEL)
    alone = read_picks(path, tomograms=SIZES)["TS_01"]
    other = read_picks(path, tomograms=SIZES, format="relion5")["TS_01"]
    np.testing.assert_allclose(alone.zyx, _picks().zyx, atol=1e-5)
    np.testing.assert_allclose(other.zyx - alone.zyx, PIXEL / 10.012, atol=1e-5)


@pytest.mark.parametrize("dialect", ["relion30", "m", "stopgap", "tomoman"])
def test_dialects_that_are_only_read_are_not_written(tmp_path: Path, dialect: str) -> None:
    with pytest.raises(FormatError, match="relion31, relion5, relion5-picker, relion4, warp"):
        write_picks(_picks(), tmp_path / "p.star", format=dialect)


def test_stopgap_asks_where_its_indices_begin(tmp_path: Path) -> None:
    path = tmp_path / "motl.star"
    header = "".join(
        f"_{name}\n" for name in ["tomo_num", "orig_x", "orig_y", "orig_z", "x_shift", "y_shift"]
    )
    path.write_text(f"data_stopgap_motivelist\nloop_\n{header}_z_shift\n_score\n7 1 2 3 0.5 0 -1 0.25\n")
    with pytest.raises(FormatError, match="first voxel is 0 or 1"):
        read_picks(path)
    found = read_picks(path, base_index=1)["7"]
    assert found.zyx.tolist() == [[1.0, 1.0, 0.5]]
    assert found.score.tolist() == [0.25]


def test_an_optimisation_set_lies_beside_the_particles(tmp_path: Path, shared_data: Path) -> None:
    sizes = _tomograms_star(tmp_path)
    path = tmp_path / "job" / "particles.star"
    write_picks(_picks(), path, format="relion5", tomograms=sizes, optimisation_set=True)
    found = starfile.read(path.with_name("optimisation_set.star"))
    assert found == {"rlnTomoParticlesFile": str(path), "rlnTomoTomogramsFile": str(sizes)}
    theirs = starfile.read(
        shared_data / "star/relion5_cylindra/Class3D/job_class3d/run_it025_optimisation_set.star"
    )
    assert set(found) <= set(theirs)
    write_picks(_picks(), tmp_path / "TS.star", format="relion5", tomograms=sizes, optimisation_set=True)
    assert (tmp_path / "TS_optimisation_set.star").is_file()
    with pytest.raises(FormatError, match=r"without a tomograms\.star"):
        write_picks(_picks(), path, format="relion5", optimisation_set=True)
    with pytest.raises(FormatError, match="optimisation set for warp"):
        write_picks(_picks(), path, format="warp", tomograms=sizes, optimisation_set=True)


PORTAL = {"relion3_star": "relion30", "relion4_star": "relion4", "stopgap_star": "stopgap"}
PORTAL["tomoman_relion_star"] = "tomoman"


def test_every_star_file_of_the_portal_gives_the_points_that_it_expects(shared_data: Path) -> None:
    folder = shared_data / "portal"
    seen = []
    for case in json.loads((folder / "expected_ndjson" / "index.json").read_text()):
        (config,) = case["source_cfg"].values()
        if config["file_format"] not in PORTAL:
            continue
        binning = float(config.get("binning", 1))
        lines = (folder / "expected_ndjson" / case["file"]).read_text().splitlines()
        expected = [json.loads(line) for line in lines]
        name = config["filter_value"].removesuffix(".tomostar")
        path = folder / "in" / config["glob_string"].rpartition("/")[2]
        found = read_picks(
            path, format=PORTAL[config["file_format"]], voxel_size=binning, pixel_size=1.0, base_index=0
        )[name]
        assert len(found) == case["count"]
        wanted = [[point["location"][axis] for axis in "zyx"] for point in expected]
        np.testing.assert_allclose(found.zyx, wanted, atol=1e-9)
        if "xyz_rotation_matrix" in expected[0]:
            assert found.rotations is not None
            matrices = [point["xyz_rotation_matrix"] for point in expected]
            np.testing.assert_allclose(found.rotations, matrices, atol=1e-9)
        seen.append(case["file"])
    assert len(seen) == 15


def test_columns_of_real_files_tell_their_dialect(shared_data: Path) -> None:
    folder = shared_data / "portal" / "in"
    assert read_picks(folder / "relion_3_star.star")["tomo_1"].voxel_size is None
    tomoman = read_picks(folder / "tomoman_relion_star.star")["grid_1_lamella1_pos1"]
    assert tomoman.voxel_size == 1.96
    np.testing.assert_allclose(tomoman.zyx[0], [15.2, 10.4, 5.2])
    assert list(read_picks(folder / "stopgap_star.star", base_index=0)) == ["1", "2", "3"]
    with pytest.raises(FormatError, match="beside rlnTomoName"):
        read_picks(folder / "relion_4_star.star", voxel_size=4.0)


def test_a_species_of_m_lies_where_its_particles_came_from(shared_data: Path) -> None:
    folder = shared_data / "star" / "m"
    species = read_picks(folder / "m_species_particles.star", voxel_size=10.0)
    export = read_picks(folder / "m_import_run_data.star", format="warp")
    scaled = read_picks(folder / "m_import_run_data.star", format="warp", voxel_size=10.0, pixel_size=4.0)
    assert (
        list(species)
        == list(export)
        == ["24aug01b_Position_20_1", "24aug01b_Position_15_5", "24aug01b_Position_1_5"]
    )
    for name, found in species.items():
        assert (found.voxel_size, export[name].voxel_size) == (10.0, 4.0)
        np.testing.assert_allclose(found.angstrom(), export[name].angstrom(), atol=1e-3, rtol=0)
        np.testing.assert_allclose(found.zyx, scaled[name].zyx, atol=1e-4, rtol=0)
        turned = export[name].rotations
        assert found.rotations is not None
        assert turned is not None
        np.testing.assert_allclose(found.rotations, turned, atol=1e-6)
    with pytest.raises(FormatError, match="voxel size of tomogram 24aug01b_Position_20_1"):
        read_picks(folder / "m_species_particles.star")


def test_template_matching_of_warp_1(shared_data: Path) -> None:
    path = shared_data / "star" / "warp1_tm_example.star"
    found = read_picks(path, voxel_size=15.0, pixel_size=5.0)["tomo_ts01.mrc_15.00Apx.mrc"]
    assert (found.voxel_size, found.score[0]) == (15.0, 1.0)
    np.testing.assert_allclose(found.zyx[0], [324.5, 375.5, 1512.353 / 3], atol=1e-9)
    assert found.rotations is not None
    first = Rotation.from_euler("ZYZ", [-99.6571, 20.108, 40.554], degrees=True).inv().as_matrix()
    np.testing.assert_allclose(found.rotations[0], first, atol=1e-9)


def test_a_class_is_a_kind_for_who_asks_for_it(tmp_path: Path) -> None:
    path, columns = tmp_path / "a.star", ("CoordinateX", "CoordinateY", "CoordinateZ", "MicrographName")
    head = "\n".join(["data_particles", "loop_", *(f"_rln{one}" for one in (*columns, "ClassNumber"))])
    path.write_text(f"{head}\n1 2 3 a 4\n4 5 6 b 2\n7 8 9 a 2\n1 1 1 a 4\n")
    assert {name: len(table) for name, table in read_picks(path).items()} == {"a": 3, "b": 1}
    assert {table.particle for table in read_kinds(path)} == {""}
    found = read_picks(path, particle="4")
    assert list(found) == ["a"]
    assert found["a"].particle == "4"
    assert found["a"].zyx.tolist() == [[3, 2, 1], [1, 1, 1]]
    assert {name: len(table) for name, table in read_picks(path, particle="2").items()} == {"a": 1, "b": 1}
    with pytest.raises(FormatError, match="no particle of class 7; expected one of its classes: 2, 4"):
        read_picks(path, particle="7")
    with pytest.raises(FormatError, match="no picks of 'ribosome'"):
        read_picks(path, particle="ribosome")
    assert len(read_kinds(path, particle="ribosome")) == 2  # which evaluate takes for that kind
    path.write_text(f"{head}\n1 2 3 a 4\n4 5 6 b x\n")
    assert len(read_picks(path)) == 2
    with pytest.raises(FormatError, match=r"row 2 of .* has rlnClassNumber 'x'"):
        read_picks(path, particle="4")
