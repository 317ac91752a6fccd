from __future__ import annotations

import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import starfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from tomocpt_stream.errors import FormatError
from tomocpt_stream.formats import read_picks, write_picks
from tomocpt_stream.frame import Frame
from tomocpt_stream.picks import Picks

if TYPE_CHECKING:
    from pathlib import Path

Format = Literal["relion31", "relion5"]
FORMATS: list[Format] = ["relion31", "relion5"]
SHAPE = (184, 630, 631)


def _picks(n: int = 20, seed: int = 0, *, rotated: bool = False, **changes: Any) -> Picks:
    rng = np.random.default_rng(seed)
    picks = Picks(
        zyx=rng.uniform(0, SHAPE, (n, 3)),
        score=rng.random(n).astype(np.float32),
        rotations=Rotation.random(n, rng=rng).as_matrix() if rotated and n else None,
        voxel_size=10.012,
        tomogram="TS_01",
        shape=SHAPE,
    )
    return replace(picks, **changes)


def _again(path: Path) -> dict[str, Picks]:
    return read_picks(path, voxel_size=10.012, shape=SHAPE)


@settings(max_examples=40, deadline=None)
@given(
    dialect=st.sampled_from(FORMATS),
    zyx=st.lists(st.tuples(*[st.floats(-100, 5000)] * 3), max_size=5),
    voxel_size=st.floats(0.5, 50),
    seed=st.integers(0, 1000),
)
def test_voxels_come_back_to_a_ten_thousandth(
    tmp_path_factory: pytest.TempPathFactory,
    dialect: Format,
    zyx: list[tuple[float, float, float]],
    voxel_size: float,
    seed: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.star"
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(len(zyx), rng=rng).as_matrix() if zyx else None
    picks = Picks(np.array(zyx), rng.random(len(zyx)), rotations, voxel_size, "TS 01", SHAPE)  # type: ignore[arg-type]
    write_picks(picks, path, format=dialect)
    found = read_picks(path, voxel_size=voxel_size, shape=SHAPE)["TS 01"]
    np.testing.assert_allclose(found.zyx, picks.zyx, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.score, picks.score, rtol=1e-5)
    assert (found.voxel_size, found.shape, found.tomogram) == (voxel_size, SHAPE, "TS 01")
    if rotations is not None:
        assert found.rotations is not None
        np.testing.assert_allclose(found.rotations, rotations, atol=1e-6)


def test_relion31_reads_back_alone_and_holds_what_relion_wants(tmp_path: Path) -> None:
    picks = _picks()
    write_picks(picks, tmp_path / "picks.star")
    blocks = starfile.read(tmp_path / "picks.star")
    assert list(blocks) == ["optics", "particles"]
    optics, particles = blocks["optics"], blocks["particles"]
    assert optics["rlnImagePixelSize"].tolist() == [10.012]
    assert optics["rlnImageDimensionality"].tolist() == [3]
    assert {"rlnOpticsGroup", "rlnOpticsGroupName", "rlnVoltage", "rlnSphericalAberration"} <= set(optics)
    np.testing.assert_allclose(particles["rlnCoordinateX"], picks.zyx[:, 2], atol=1e-6)
    np.testing.assert_allclose(particles["rlnCoordinateZ"], picks.zyx[:, 0], atol=1e-6)
    assert set(particles["rlnMicrographName"]) == {"TS_01"}
    assert set(particles["rlnOpticsGroup"]) == {1}
    found = read_picks(tmp_path / "picks.star")["TS_01"]
    assert found.voxel_size == 10.012
    assert found.shape is None
    assert found.rotations is None
    np.testing.assert_allclose(found.zyx, picks.zyx, atol=1e-6)


def test_scores_have_six_significant_digits(tmp_path: Path) -> None:
    scores = np.array([0.123456789, 12345.678, 1.5e-7], dtype=np.float32)
    picks = Picks(np.zeros((3, 3)), scores, voxel_size=1.0, tomogram="a")
    write_picks(picks, tmp_path / "picks.star")
    rows = [line.split() for line in (tmp_path / "picks.star").read_text().splitlines() if "\ta\t" in line]
    assert [row[4] for row in rows] == ["0.123457", "12345.7", "1.5e-07"]


def test_relion5_centres_on_half_the_size(tmp_path: Path) -> None:
    where, score = np.array([[0.0, 10.0, 315.5]]), np.ones(1, dtype=np.float32)
    picks = Picks(where, score, voxel_size=10.0, tomogram="a", shape=SHAPE)
    write_picks(picks, tmp_path / "picks.star", format="relion5")
    blocks = starfile.read(tmp_path / "picks.star", always_dict=True)
    assert list(blocks) == ["particles"]
    row = blocks["particles"].iloc[0]
    assert row["rlnTomoName"] == "a"
    assert row["rlnCenteredCoordinateXAngst"] == 3155.0 - 6310 / 2
    assert row["rlnCenteredCoordinateYAngst"] == 100.0 - 6300 / 2
    assert row["rlnCenteredCoordinateZAngst"] == 0.0 - 1840 / 2


def _tomograms_star(folder: Path) -> Path:
    path = folder / "tomograms.star"
    path.write_text(
        "data_global\n\nloop_\n_rlnTomoName #1\n_rlnVoltage #2\n_rlnTomoTiltSeriesPixelSize #3\n"
        "_rlnTomoTomogramBinning #4\n_rlnTomoSizeX #5\n_rlnTomoSizeY #6\n_rlnTomoSizeZ #7\n"
        "TS_01 300.0 1.35 7.407 4000 3996 1200\nTS_02 200.0 2.0 4.0 4000 4000 1200\n"
    )
    return path


def test_relion5_takes_unbinned_sizes_from_a_tomograms_star(tmp_path: Path) -> None:
    sizes = _tomograms_star(tmp_path)
    picks = [
        _picks(3, tomogram="rec_TS_01", voxel_size=9.99945),
        _picks(2, 1, tomogram="TS_02", voxel_size=8.0),
    ]
    write_picks(picks, tmp_path / "picks.star", format="relion5", tomograms=sizes)
    blocks = starfile.read(tmp_path / "picks.star")
    assert blocks["optics"]["rlnTomoTiltSeriesPixelSize"].tolist() == [1.35, 2.0]
    assert blocks["optics"]["rlnVoltage"].tolist() == [300, 200]
    assert blocks["particles"]["rlnOpticsGroup"].tolist() == [1, 1, 1, 2, 2]
    assert blocks["particles"]["rlnTomoName"].tolist() == ["TS_01"] * 3 + ["TS_02"] * 2
    expected = picks[0].zyx[:, 1] * 9.99945 - 3996 * 1.35 / 2
    np.testing.assert_allclose(blocks["particles"]["rlnCenteredCoordinateYAngst"][:3], expected, atol=1e-5)
    found = read_picks(tmp_path / "picks.star", tomograms=str(sizes))
    np.testing.assert_allclose(found["TS_01"].zyx, picks[0].zyx, atol=1e-5)
    np.testing.assert_allclose(found["TS_02"].zyx, picks[1].zyx, atol=1e-5)
    assert found["TS_01"].voxel_size == pytest.approx(9.99945)
    assert found["TS_01"].shape == (162, 539, 540)


def test_sizes_may_come_from_anything_that_knows_them(tmp_path: Path) -> None:
    picks = _picks(4)
    path = tmp_path / "picks.star"
    write_picks(picks, path, format="relion5")

    class Tomogram:
        frame = Frame((9, 9, 9), 99.0, SHAPE, 10.012)
        shape, voxel_size = (9, 9, 9), 99.0

    for value in ((SHAPE, 10.012), picks, Tomogram()):
        found = read_picks(path, tomograms={"TS_01": value})["TS_01"]
        np.testing.assert_allclose(found.zyx, picks.zyx, atol=1e-5)
        assert (found.shape, found.voxel_size) == (SHAPE, 10.012)
        bare = replace(picks, shape=None)
        write_picks(bare, tmp_path / "bare.star", format="relion5", tomograms={"TS_01": value})
        assert (tmp_path / "bare.star").read_text() == path.read_text()


@pytest.mark.parametrize("dialect", FORMATS)
def test_several_tomograms_share_a_file(tmp_path: Path, dialect: Format) -> None:
    tables = {
        "TS_01": _picks(5, rotated=True),
        "b": _picks(7, 1, rotated=True, voxel_size=4.99, shape=(100, 200, 300)),
        "c": _picks(2, 2, rotated=True),
        "none": _picks(0, voxel_size=4.99),
    }
    path = tmp_path / "picks.star"
    write_picks(tables, path, format=dialect)
    found = read_picks(path, tomograms=tables)
    assert list(found) == list(tables)
    for name, table in tables.items():
        np.testing.assert_allclose(found[name].zyx, table.zyx, atol=1e-5)
        assert found[name].voxel_size == table.voxel_size
        assert found[name].tomogram == name
    if dialect == "relion31":
        assert starfile.read(path)["optics"]["rlnImagePixelSize"].tolist() == [10.012, 4.99]
        assert read_picks(path)["b"].voxel_size == 4.99


def test_an_iterable_of_picks_keeps_their_names(tmp_path: Path) -> None:
    write_picks((_picks(2, i, tomogram=f"t{i}") for i in range(3)), tmp_path / "picks.star")
    assert list(read_picks(tmp_path / "picks.star")) == ["t0", "t1", "t2"]


@pytest.mark.parametrize("dialect", FORMATS)
def test_no_picks_are_a_valid_file(tmp_path: Path, dialect: Format) -> None:
    path = tmp_path / "picks.star"
    write_picks(_picks(0, tomogram="TS 7"), path, format=dialect)
    assert len(starfile.read(path, always_dict=True)["particles"]) == 0
    found = _again(path)
    assert list(found) == ["TS 7"]
    assert len(found["TS 7"]) == 0
    assert found["TS 7"].voxel_size == 10.012
    write_picks([], path, format=dialect)
    assert _again(path) == {}


@pytest.mark.parametrize("dialect", FORMATS)
def test_angles_follow_the_zyz_convention(tmp_path: Path, dialect: Format) -> None:
    angles = np.array([[30.0, 40.0, 50.0], [-100.0, 90.0, 170.0], [25.0, 0.0, 0.0], [0.0, 180.0, 15.0]])
    rotations = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()
    write_picks(_picks(4, rotations=rotations), tmp_path / "picks.star", format=dialect)
    particles = starfile.read(tmp_path / "picks.star", always_dict=True)["particles"]
    written = particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(dtype=float)
    np.testing.assert_allclose(written[:2], angles[:2], atol=1e-5)
    found = _again(tmp_path / "picks.star")["TS_01"].rotations
    assert found is not None
    np.testing.assert_allclose(found, rotations, atol=1e-6)


def test_a_file_is_replaced_whole_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "picks.star"
    write_picks(_picks(30), path)
    before = path.read_bytes()
    with pytest.raises(FormatError):
        write_picks([_picks(3), _picks(3, voxel_size=None, tomogram="b")], path)
    assert path.read_bytes() == before
    write_picks(_picks(2), path)
    assert len(read_picks(path)["TS_01"]) == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["picks.star"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_the_same_picks_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.star", "b.star"):
        write_picks(_picks(rotated=True), tmp_path / name)
    assert (tmp_path / "a.star").read_bytes() == (tmp_path / "b.star").read_bytes()


@pytest.mark.parametrize(
    ("picks", "dialect", "message"),
    [
        (_picks(voxel_size=None), "relion31", "voxel size of tomogram TS_01"),
        (_picks(shape=None), "relion5", "size of tomogram TS_01"),
        (_picks(tomogram=""), "relion31", "tomogram name ''"),
        (_picks(tomogram="a\tb"), "relion31", "tomogram name"),
        (_picks(tomogram="it's"), "relion31", "tomogram name"),
        (_picks(tomogram="a#b"), "relion5", "tomogram name"),
        (_picks(tomogram="nan"), "relion5", "tomogram name"),
        ([_picks(), _picks(voxel_size=5.0)], "relion31", "10.012 and of 5.0"),
        ([_picks(rotated=True), _picks(tomogram="b")], "relion31", "rotations"),
        (_picks(1, rotations=np.zeros((1, 3, 3))), "relion31", "rotations"),
        (_picks(1, score=np.array([np.nan], np.float32)), "relion31", "pick 0 .* score nan"),
        (_picks(1, zyx=np.array([[0, 1e300, 0]])), "relion31", "pick 0 of TS_01 at"),
        (_picks(1, voxel_size=1e-5), "relion5", "voxels of 1e-05 Å"),
        (_picks(), "relion6", "relion31, relion5"),
    ],
)
def test_what_cannot_be_written_is_asked_for(tmp_path: Path, picks: Any, dialect: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_picks(picks, tmp_path / "picks.star", format=dialect)
    assert not list(tmp_path.iterdir())


def test_odd_names_come_back(tmp_path: Path) -> None:
    names = ["001", "1e5", "data_x", "_loop", "loop_", "TS 01 é", "a.mrc", "Position_1_10.00Apx"]
    write_picks({name: _picks(2, i) for i, name in enumerate(names)}, tmp_path / "picks.star")
    assert list(read_picks(tmp_path / "picks.star")) == names


def test_unknown_suffixes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"suffix '.foo'.*relion31, relion5"):
        write_picks(_picks(), tmp_path / "picks.foo")
    with pytest.raises(FormatError, match="no file"):
        read_picks(tmp_path / "absent.star")
    with pytest.raises(FormatError, match="no file"):
        read_picks(tmp_path, format="relion31")
    write_picks(_picks(), tmp_path / "picks.txt", format="relion31")
    assert len(read_picks(tmp_path / "picks.txt", format="relion31")["TS_01"]) == 20


def _star(folder: Path, columns: list[str], rows: list[str], optics: str = "") -> Path:
    path = folder / "made.star"
    header = "\n".join(f"_{column} #{i}" for i, column in enumerate(columns, start=1))
    path.write_text(f"{optics}\n\ndata_particles\n\nloop_\n{header}\n" + "\n".join(rows) + "\n")
    return path


XYZ = ["rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ"]
OPTICS = "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n1 10.0\n2 5.0\n"


def test_origins_are_subtracted(tmp_path: Path) -> None:
    angstrom = [*XYZ, "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst", "rlnMicrographName"]
    path = _star(tmp_path, angstrom, ["10 20 30 5 -10 0 a"])
    with pytest.raises(FormatError, match="does not say the voxel size of tomogram a"):
        read_picks(path)
    assert read_picks(path, voxel_size=5.0)["a"].zyx.tolist() == [[30.0, 22.0, 9.0]]
    pixels = [*XYZ, "rlnOriginX", "rlnOriginY", "rlnOriginZ", "rlnMicrographName"]
    assert read_picks(_star(tmp_path, pixels, ["10 20 30 1 2 3 a"]))["a"].zyx.tolist() == [[27.0, 18.0, 9.0]]
    centred = [c.replace("Coordinate", "CenteredCoordinate") + "Angst" for c in XYZ] + angstrom[3:]
    path = _star(tmp_path, centred, ["0 10 -20 5 -10 0 a"])
    found = read_picks(path, voxel_size=5.0, shape=(10, 20, 30))["a"]
    assert found.zyx.tolist() == [[1.0, 14.0, 14.0]]


def test_origins_and_angles_turn_with_the_subtomogram(tmp_path: Path) -> None:
    columns = [
        *XYZ,
        "rlnOriginXAngst",
        "rlnOriginYAngst",
        "rlnOriginZAngst",
        "rlnMicrographName",
        "rlnAngleRot",
    ]
    columns += ["rlnAngleTilt", "rlnAnglePsi"] + [f"rlnTomoSubtomogram{a}" for a in ("Rot", "Tilt", "Psi")]
    found = read_picks(_star(tmp_path, columns, ["10 20 30 4 0 0 a 10 20 30 90 0 0"]), voxel_size=2.0)["a"]
    quarter = Rotation.from_euler("Z", -90, degrees=True)  # the inverse of rot = 90
    np.testing.assert_allclose(found.zyx[0, ::-1], [10, 20, 30] - quarter.apply([2, 0, 0]), atol=1e-9)
    inner = Rotation.from_euler("ZYZ", [10, 20, 30], degrees=True).inv()
    assert found.rotations is not None
    np.testing.assert_allclose(found.rotations[0], (quarter * inner).as_matrix(), atol=1e-9)


def test_voxel_sizes_come_from_the_optics_group_unless_passed(tmp_path: Path) -> None:
    path = _star(tmp_path, [*XYZ, "rlnMicrographName", "rlnOpticsGroup"], ["1 2 3 a 2", "4 5 6 b 1"], OPTICS)
    assert {name: picks.voxel_size for name, picks in read_picks(path).items()} == {"a": 5.0, "b": 10.0}
    given = read_picks(path, tomograms={"a": ((3, 4, 5), 5.02)})
    assert (given["a"].voxel_size, given["a"].shape, given["b"].voxel_size) == (5.02, (3, 4, 5), 10.0)
    assert given["a"].zyx.tolist() == [[3.0, 2.0, 1.0]]
    with pytest.raises(FormatError, match="pass pixel_size=5 if they count those pixels, pixel_size=7 if"):
        read_picks(path, voxel_size=7.0)
    other = read_picks(path, voxel_size=20.0, pixel_size=10.0)["a"]
    assert (other.zyx.tolist(), other.voxel_size) == ([[1.5, 1.0, 0.5]], 20.0)
    assert read_picks(path)["a"].score.tolist() == [1.0]


def test_paths_in_name_columns_are_names(tmp_path: Path) -> None:
    rows = ["1 2 3 ../../etc/TS_01.mrc.tomostar", "1 2 3 C:\\data\\TS_02.rec", "1 2 3 TS_03.mrc"]
    found = read_picks(_star(tmp_path, [*XYZ, "rlnMicrographName"], rows))
    assert list(found) == ["TS_01", "TS_02", "TS_03.mrc"]


@pytest.mark.parametrize(
    ("columns", "rows", "optics", "message"),
    [
        (
            [*XYZ, "rlnMicrographName"],
            ["1 2 3 a", "1 x 3 a"],
            "",
            "row 2 of data_particles .* rlnCoordinateY 'x'",
        ),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 nan 3 a"], "", "row 2 .* rlnCoordinateY 'nan'"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 -1e10 3 a"], "", "row 2 .* rlnCoordinateY '-1e.10'"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 2 3 a\x00b"], "", r"rlnMicrographName 'a\\x00b'"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 " + "a" * 1001], "", "at most 1000 printable"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 inf 3 a"], "", "row 2 .* rlnCoordinateY 'inf'"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 a", '1 2 3 ""'], "", "row 2 .* has no rlnMicrographName"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 2 3"], "", "line 11 .* 3 values"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 2 3 a 5 6"], "", "cannot be read as STAR"),
        ([*XYZ, "rlnMicrographName"], ["1 2 3"], "", "cannot be read as STAR"),
        (
            [*XYZ, "rlnMicrographName", "rlnAutopickFigureOfMerit"],
            ["1 2 3 a b"],
            "",
            "row 1 .*FigureOfMerit 'b'",
        ),
        ([*XYZ, "rlnMicrographName", "rlnCoordinateX"], ["1 2 3 a 5"], "", "column rlnCoordinateX twice"),
        (XYZ, ["1 2 3"], "", "no column of tomogram names"),
        (XYZ[:2], ["1 2"], "", "0 tables of picks"),
        ([*XYZ, "rlnMicrographName", "rlnOpticsGroup"], ["1 2 3 a 7"], OPTICS, "row 1 .* optics group 7"),
        (
            [*XYZ, "rlnMicrographName", "rlnOpticsGroup"],
            ["1 2 3 a 1", "1 2 3 a 2"],
            OPTICS,
            "tomogram a the voxel sizes 5, 10",
        ),
        (
            [*XYZ, "rlnTomoName", "rlnOpticsGroup"],
            ["1 2 3 a 1"],
            OPTICS.replace("rlnImagePixelSize", "rlnTomoTiltSeriesPixelSize"),
            "RELION 4 means pixels of the tilt series",
        ),
    ],
)
def test_bad_files_are_errors_that_say_where(
    tmp_path: Path, columns: list[str], rows: list[str], optics: str, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_picks(_star(tmp_path, columns, rows, optics))


def test_centred_picks_ask_for_what_they_need(tmp_path: Path) -> None:
    path = tmp_path / "picks.star"
    write_picks(_picks(3), path, format="relion5")
    with pytest.raises(FormatError, match="voxel size of tomogram TS_01"):
        read_picks(path)
    with pytest.raises(FormatError, match="size of tomogram TS_01"):
        read_picks(path, voxel_size=10.0)
    with pytest.raises(FormatError, match="'TS_01' is not among those given: other"):
        read_picks(path, tomograms={"other": (SHAPE, 10.0)})
    with pytest.raises(FormatError, match="0 tables of picks"):
        read_picks(path, format="relion31")
    with pytest.raises(FormatError, match="for tomogram TS_01"):
        read_picks(path, tomograms={"TS_01": 10.0})
    with pytest.raises(FormatError, match="rlnTomoSizeX"):
        read_picks(path, tomograms=path)


STAR_LINES = ["data_particles", "data_", "data_optics", "loop_", "", "# x", '"', "' '", "_a b c"]
STAR_LINES += ["_rlnCoordinateX #1", "_rlnCoordinateY", "_rlnCoordinateZ 3", "_rlnTomoName"]
STAR_LINES += ["1 2 3 a", "1 2 3", "1 2 3 nan"]


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.sampled_from(STAR_LINES),
            max_size=14,
        ).map(lambda lines: "\n".join(lines).encode()),
    )
)
def test_any_bytes_are_picks_or_a_format_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.star"
    path.write_bytes(text)
    try:
        found = read_picks(path)
    except FormatError:
        return
    assert all(np.isfinite(picks.zyx).all() for picks in found.values())


def test_a_file_read_after_a_broken_one_of_its_name_is_the_new_one(tmp_path: Path) -> None:
    path = _star(tmp_path, [*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 2 3 a 5 6 7"])
    with pytest.raises(FormatError):
        read_picks(path)
    assert len(read_picks(_star(tmp_path, [*XYZ, "rlnMicrographName"], ["1 2 3 a", "1 2 3 a"]))["a"]) == 2


def test_a_real_relion_3_file(shared_data: Path) -> None:
    (picks,) = read_picks(shared_data / "star" / "relion3.1.star").values()
    assert (picks.tomogram, len(picks), picks.voxel_size) == ("TS_01", 57, 5.0)
    expected = np.array([349.444 - 0.072427 / 5, 918.864 - 0.072427 / 5, 314.929 - 3.947427 / 5])
    np.testing.assert_allclose(picks.zyx[0], expected, atol=1e-9)
    assert picks.rotations is not None
    first = Rotation.from_euler("ZYZ", [-16.91486, 175.815434, 47.775756], degrees=True).inv().as_matrix()
    np.testing.assert_allclose(picks.rotations[0], first, atol=1e-9)


def test_real_relion_5_files(shared_data: Path) -> None:
    folder = shared_data / "star" / "relion5_cylindra"
    sizes = folder / "Tomograms" / "job_tomo" / "tomograms.star"
    found = read_picks(folder / "Picks" / "job_picks" / "particles.star", tomograms=sizes)
    assert {name: len(picks) for name, picks in found.items()} == {"TS_01": 3, "TS_02": 2}
    picks = found["TS_01"]
    assert (picks.shape, picks.voxel_size) == ((44, 136, 84), 10.52)
    expected = np.array([11.16, 765.48005, -176.94]) / 10.52 + [22, 68, 42]
    np.testing.assert_allclose(picks.zyx[0], expected, atol=1e-9)
    refined = folder / "Refine3D" / "job_refine" / "run_it050_data.star"
    moved = read_picks(refined, tomograms=sizes)["TS_01"]
    origins = np.array([-6.78404, 2.498456, -2.41904]) / 10.52
    np.testing.assert_allclose(moved.zyx[0], expected - origins, atol=1e-9)
    filaments = read_picks(folder / "Class3D" / "job_class3d" / "run_it025_data.star", tomograms=sizes)
    assert {name: len(picks) for name, picks in filaments.items()} == {"TS_01": 5, "TS_02": 5}


def test_a_real_export_of_warp_lies_where_m_put_it(shared_data: Path) -> None:
    source = shared_data / "star" / "m" / "m_import_run_data.star"
    with pytest.raises(FormatError, match="Warp voxels of its export"):
        read_picks(source)
    found = np.concatenate([p.angstrom() for p in read_picks(source, format="relion31").values()])
    species = starfile.read(shared_data / "star" / "m" / "m_species_particles.star")
    expected = species[["wrpCoordinateX1", "wrpCoordinateY1", "wrpCoordinateZ1"]].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_the_truth_of_simulated_tomograms_reads(shared_data: Path) -> None:
    path = shared_data / "sim10A" / "sim_val_1.star"
    found = read_picks(path, voxel_size=10.0, shape=(96, 256, 256))
    assert list(found) == ["sim_val_1"]
    assert len(found["sim_val_1"]) == 80
    assert found["sim_val_1"].zyx[0].tolist() == [71.0, 208.0, 198.0]
    classes = [len(read_picks(path, particle=f"{i}")["sim_val_1"]) for i in range(1, 7)]
    assert classes == [14, 20, 14, 12, 6, 14]
