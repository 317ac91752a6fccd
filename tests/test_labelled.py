from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.scorers import MatchedFilter
from tomocpt_stream.blocks import Window
from tomocpt_stream.crops import Sampling, read_crop
from tomocpt_stream.curation import Curated, write_curated
from tomocpt_stream.errors import FormatError, SourceError
from tomocpt_stream.formats import write_picks
from tomocpt_stream.labelled import LabelledTomogram, open_labelled
from tomocpt_stream.network import build_network, named_architecture
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.picker import Picker, picker_metadata
from tomocpt_stream.picks import Picks
from tomocpt_stream.targets import paint_box
from tomocpt_stream.tomogram import open_tomogram
from tomocpt_stream.training_table import read_table

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = Window((32, 32, 32), (4, 4, 4))
CENTRES = np.array([[12.3, 20.0, 31.6], [30.0, 59.0, 3.2]])
ROW_3: dict[str, Any] = {"diameter": 80.0, "origin": "row 3"}


@pytest.fixture(scope="module")
def picker() -> Picker:
    architecture = named_architecture("small") | {"depths": [1, 1, 1, 1]}
    return Picker(
        build_network(architecture), picker_metadata(architecture, window=WINDOW, particle_radius=4.0)
    )


def _balls(centres: npt.NDArray[np.float64], radius: float = 8.0) -> npt.NDArray[np.float32]:
    box = (slice(0, 40), slice(0, 64), slice(0, 72))
    noise = np.random.default_rng(0).standard_normal((40, 64, 72), dtype=np.float32)
    return 0.1 * noise - 4 * paint_box(centres, box, radius=radius)


def _picks(centres: npt.NDArray[np.float64] = CENTRES, **fields: Any) -> Picks:
    return Picks(centres, np.ones(len(centres), np.float32), **fields)


def _write(folder: Path, name: str = "TS_1") -> Path:
    path = folder / f"{name}.mrc"
    write_mrc(path, _balls(CENTRES), 5.0)
    return path


def test_labels_lie_where_the_particles_are_to_a_part_of_a_voxel(tmp_path: Path, picker: Picker) -> None:
    # 80 Å over 8 working voxels: 10 Å, two voxels of the tomogram.
    tomogram = open_tomogram(_balls(CENTRES), voxel_size=5.0, name="TS_1")
    (one,) = open_labelled([LabelledTomogram(tomogram, _picks(), 80.0)], picker)
    item = one.ingest(tmp_path)
    assert item.volume.shape == (20, 32, 36)
    np.testing.assert_allclose(item.centres, (CENTRES + 0.5) / 2 - 0.5)
    voxels, label = read_crop(item, (-4, 0, 4), Sampling(window=WINDOW, radius=4.0))
    # The dark ball and its label, both resampled or painted on the working grid, have one centroid.
    near = (slice(4, 16), slice(3, 16), slice(5, 18))
    ball, painted = np.where(voxels < -1, -voxels, 0)[near], label[near]
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        place = np.arange(ball.shape[axis])
        found, wanted = ((weight.sum(axis=others) * place).sum() / weight.sum() for weight in (ball, painted))
        assert found == pytest.approx(wanted, abs=0.15)
    np.testing.assert_allclose(
        np.array(np.unravel_index(label[near].argmax(), painted.shape)) + 3, [9, 9, 10], atol=2
    )


def test_bright_tomograms_are_negated_for_a_picker_of_dark_ones(tmp_path: Path, picker: Picker) -> None:
    volume = _balls(CENTRES)
    items = [
        LabelledTomogram(open_tomogram(volume, voxel_size=5.0, name="dark"), _picks(), 80.0),
        LabelledTomogram(open_tomogram(-volume, voxel_size=5.0, name="bright"), _picks(), 80.0, "bright"),
    ]
    dark, bright = (one.ingest(tmp_path) for one in open_labelled(items, picker))
    sampling = Sampling(window=WINDOW, radius=4.0)
    assert (dark.negate, bright.negate) == (False, True)
    first, second = (read_crop(item, (0, 0, 0), sampling)[0] for item in (dark, bright))
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_a_volume_is_ingested_once(tmp_path: Path, picker: Picker) -> None:
    items = [LabelledTomogram(_write(tmp_path), _picks(), 80.0)]
    open_labelled(items, picker)[0].ingest(tmp_path / "volumes")
    stored = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "volumes").rglob("*.json"))
    open_labelled(items, picker)[0].ingest(tmp_path / "volumes")
    assert stored == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "volumes").rglob("*.json"))


def test_a_table_with_truth_in_any_format(tmp_path: Path, picker: Picker) -> None:
    for name in ("TS_1", "TS_2", "TS_3"):
        _write(tmp_path, name)
    known: dict[str, Any] = {"voxel_size": 5.0, "shape": (40, 64, 72)}
    both = [_picks(tomogram=name, **known) for name in ("TS_1", "TS_9")]
    write_picks(both, tmp_path / "both.star")
    write_picks(_picks(tomogram="other", **known), tmp_path / "TS_2.mod")
    kept = _picks(tomogram="TS_3", particle="ribosome", **known)
    gone = _picks(CENTRES[:1] + 3, tomogram="TS_3", particle="ribosome", **known)
    write_curated(Curated(kept, np.array([False, True]), gone), tmp_path / "curated.csv")
    (tmp_path / "table.csv").write_text(
        "picks,tomogram,diameter,contrast,particle,group\n"
        "both.star,TS_1.mrc,80,,,\n\n"
        f"TS_2.mod,{tmp_path / 'TS_2.mrc'},100.5,bright,,day 2\n"
        "curated.csv , TS_3.mrc,80,dark,ribosome,day 2\n"
    )
    items = read_table(tmp_path / "table.csv")
    assert [(one.diameter, one.contrast, one.particle, one.group) for one in items] == [
        (80.0, "dark", "", ""),
        (100.5, "bright", "", "day 2"),
        (80.0, "dark", "ribosome", "day 2"),
    ]
    opened = open_labelled(items, picker)
    assert [one.tomogram.name for one in opened] == ["TS_1", "TS_2", "TS_3"]
    for one in opened:
        np.testing.assert_allclose(sorted(one.picks.zyx.tolist()), sorted(CENTRES.tolist()), atol=1e-4)
    assert [one.group for one in opened][1:] == ["day 2", "day 2"]
    assert opened[0].group not in ("", "day 2")


def test_what_a_row_names_must_be_there_and_fit(tmp_path: Path, picker: Picker) -> None:
    tomogram = _write(tmp_path)
    good = LabelledTomogram(tomogram, _picks(voxel_size=5.0), 80.0, origin="row 2")

    def refused(item: LabelledTomogram) -> str:
        with pytest.raises((SourceError, FormatError)) as error:
            open_labelled([good, item], picker)
        return str(error.value)

    def asked(source: Path, picks: Picks | Path) -> str:
        return refused(LabelledTomogram(source, picks, 120.0, origin="row 3"))

    assert asked(tmp_path / "none.mrc", _picks()).startswith("row 3: ")
    assert asked(tomogram, tmp_path / "none.star").startswith("row 3: ")
    assert "voxels of 1.25 Å" in asked(tomogram, _picks(voxel_size=1.25))
    assert "2 of 2 particles outside TS_1" in asked(tomogram, _picks(4 * CENTRES + 90))
    write_picks([_picks(tomogram=name, voxel_size=5.0) for name in ("a", "b")], tmp_path / "ab.star")
    assert "0 tables for 'TS_1'; its tomograms are 'a', 'b'" in asked(tomogram, tmp_path / "ab.star")
    for diameter in (1e-30, 9.0, 400.0, 1e30):
        assert "longest edge of 72" in refused(LabelledTomogram(tomogram, _picks(), diameter))
    again = refused(LabelledTomogram(tomogram, _picks(), 80.0, origin="row 3"))
    assert "row 3 is the tomogram of row 2 again" in again


def test_particles_that_do_not_reach_into_the_tomogram_are_left_out(
    tmp_path: Path, picker: Picker, caplog: pytest.LogCaptureFixture
) -> None:
    """What is far away has no voxel to learn from, and would be a label that scores nothing."""
    far = np.array([[-9.0, 20, 20], [1e300, 20, 20]])
    near = np.array([[-7.0, 20, 20]])  # 8 voxels are its radius
    item = LabelledTomogram(_write(tmp_path), _picks(np.concatenate([far, CENTRES, near])), 80.0)
    with caplog.at_level(logging.WARNING, logger="tomocpt_stream"):
        (one,) = open_labelled([item], picker)
    np.testing.assert_array_equal(one.picks.zyx, np.concatenate([CENTRES, near]))
    assert "TS_1: 2 of 5 particles lie outside" in caplog.text


@pytest.mark.parametrize("name", ["p.csv", "p.mod", "p.star"])
def test_a_file_that_counts_other_voxels_is_refused(tmp_path: Path, picker: Picker, name: str) -> None:
    """Picks of a coarser tomogram lie inside the finer one, all in one of its corners."""
    path, tomogram = tmp_path / name, _write(tmp_path)
    write_picks(_picks(CENTRES / 2, voxel_size=10.0, tomogram="TS_1", shape=(20, 32, 36)), path)
    with pytest.raises((SourceError, FormatError), match=r"row 3: .* 10 Å .* 5 Å"):
        open_labelled([LabelledTomogram(tomogram, path, **ROW_3)], picker)


def test_a_size_that_somebody_rounded_is_the_same(tmp_path: Path, picker: Picker) -> None:
    write_picks(_picks(voxel_size=5.04, tomogram="TS_1", shape=(40, 64, 72)), tmp_path / "p.csv")
    (one,) = open_labelled([LabelledTomogram(_write(tmp_path), tmp_path / "p.csv", 80.0)], picker)
    np.testing.assert_allclose(one.picks.zyx, CENTRES, atol=1e-4)


def test_a_file_in_angstrom_fits_a_tomogram_of_any_voxel_size(tmp_path: Path, picker: Picker) -> None:
    coarse = _picks(CENTRES / 2, voxel_size=10.0, tomogram="TS_1", shape=(20, 32, 36))
    write_picks(coarse, tmp_path / "p.json", format="copick")
    (one,) = open_labelled([LabelledTomogram(_write(tmp_path), tmp_path / "p.json", 80.0)], picker)
    np.testing.assert_allclose(one.picks.zyx, CENTRES, atol=1e-4)


def test_a_table_says_the_voxel_size_that_a_header_does_not(tmp_path: Path, picker: Picker) -> None:
    write_mrc(tmp_path / "TS_1.mrc", _balls(CENTRES), 0.0)
    write_picks(_picks(voxel_size=1.0, tomogram="TS_1", shape=(40, 64, 72)), tmp_path / "p.csv")
    table = tmp_path / "table.csv"
    table.write_text("tomogram,picks,diameter,voxel_size\nTS_1.mrc,p.csv,80,\n")
    with pytest.raises(SourceError, match=r"row 2 of .*states no voxel size"):
        open_labelled(read_table(table), picker)
    table.write_text("tomogram,picks,diameter,voxel_size\nTS_1.mrc,p.csv,80,5\n")
    (one,) = open_labelled(read_table(table), picker)
    assert (one.tomogram.voxel_size, one.grid.voxel_size) == (5.0, 10.0)
    np.testing.assert_allclose(one.picks.zyx, CENTRES, atol=1e-4)


def test_a_table_says_what_is_annotated_partial_and_of_other_kinds(tmp_path: Path, picker: Picker) -> None:
    _write(tmp_path)
    mask = np.zeros((20, 32, 36), np.int8)
    mask[:10] = 1
    write_mrc(tmp_path / "mask.mrc", mask, 10.0)
    known: dict[str, Any] = {"voxel_size": 5.0, "shape": (40, 64, 72), "tomogram": "TS_1"}
    both = [_picks(particle="a", **known), _picks(CENTRES[:1] + 12, particle="b", **known)]
    write_picks(both, tmp_path / "both.csv")
    (tmp_path / "table.csv").write_text(
        "tomogram,picks,diameter,particle,annotated,partial,others,weight\n"
        "TS_1.mrc,both.csv,80,a,mask.mrc,yes,*,2.5\n"
        'TS_1.mrc, both.csv, 90, a, "0:20, :, 1:72", NO, both.csv,\n'
        "TS_1.mrc,both.csv,100,a,0:20 0:64 1:72,,,1\n"
    )
    items = read_table(tmp_path / "table.csv")
    assert [one.partial for one in items] == [True, False, False]
    assert [one.weight for one in items] == [2.5, 1.0, 1.0]
    assert [one.annotated for one in items] == [
        str(tmp_path / "mask.mrc"), "0:20, :, 1:72", "0:20 0:64 1:72",
    ]  # fmt: skip
    assert [one.others for one in items] == ["*", str(tmp_path / "both.csv"), None]
    opened = open_labelled(items, picker)
    # The particles themselves, which the file of others has as well, are not among the others.
    for one in opened[:2]:
        np.testing.assert_allclose(one.others, CENTRES[:1] + 12, atol=1e-4)
    assert opened[2].others.shape == (0, 3)
    first, last = (one.ingest(tmp_path / "volumes") for one in (opened[0], opened[2]))
    assert first.weight == 2.5
    np.testing.assert_allclose(first.others, (CENTRES[:1] + 12.5) / 2 - 0.5, atol=1e-4)
    for made, planes in ((first, slice(0, 9)), (last, slice(0, 8))):
        assert made.annotated is not None
        z, y, x = ((0, n) for n in made.volume.shape)
        inside = made.annotated.inside((z, y, x))
        assert inside[planes, :, 2].all()
        assert not inside[planes.stop :].any()
    assert len(first.certain) == 1


def test_of_partial_picks_the_others_are_doubtful_and_the_log_says_so(
    tmp_path: Path, picker: Picker, caplog: pytest.LogCaptureFixture
) -> None:
    tomogram = open_tomogram(_balls(CENTRES), voxel_size=5.0, name="TS_1")
    items = [LabelledTomogram(tomogram, _picks(CENTRES[:1]), 80.0, partial=True)]
    with caplog.at_level(logging.INFO, logger="tomocpt_stream"):
        one = open_labelled(items, picker)[0].ingest(tmp_path)
    (place,) = one.doubtful
    np.testing.assert_allclose(place, (CENTRES[1] + 0.5) / 2 - 0.5, atol=2)
    assert "TS_1: partial picks: 1 of" in caplog.text
    again = open_labelled(items, picker)[0].ingest(tmp_path)
    np.testing.assert_array_equal(again.doubtful, one.doubtful)
    # By the map of a picker it is what that picker sees.
    by_map = open_labelled(items, picker)[0].ingest(tmp_path, scorer=MatchedFilter(WINDOW, 4.0))
    np.testing.assert_allclose(by_map.doubtful[0], place, atol=2)


def test_what_crops_follow_from_is_in_the_fingerprint(tmp_path: Path, picker: Picker) -> None:
    tomogram = open_tomogram(_write(tmp_path))
    asked: list[dict[str, Any]] = [
        {}, {"annotated": "0:20,0:64,0:72"}, {"annotated": "0:21,0:64,0:72"}, {"partial": True},
        {"annotated": np.ones((40, 64, 72), np.int8)}, {"others": _picks(CENTRES + 12)},
        {"others": _picks(CENTRES + 13)}, {"weight": 2.0},
    ]  # fmt: skip
    prints = []
    for more in (*asked, *asked):
        (one,) = open_labelled([LabelledTomogram(tomogram, _picks(), 80.0, **more)], picker)
        prints.append(one.fingerprint)
    assert len(set(prints)) == len(asked)
    assert prints[: len(asked)] == prints[len(asked) :]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"annotated": "0:41,0:64,0:72"}, "row 3: the annotated box 0:41"),
        ({"annotated": "32:40,0:64,30:72"}, "row 3: none of 2 particles in the annotated part of TS_1"),
        ({"annotated": "absent.mrc"}, "row 3: .*absent.mrc"),
        ({"annotated": np.ones((10, 64, 72), np.int8)}, "row 3: the mask mask of"),
        ({"picks": _picks(CENTRES[:0]), "partial": True}, "row 3: partial picks of TS_1 without a single"),
        ({"others": "absent.star"}, "row 3: .*absent.star"),
        ({"others": Picks(CENTRES, np.ones(2, np.float32), voxel_size=2.5)}, "row 3: .*voxels of 2.5"),
    ],
)
def test_regions_and_others_must_fit(
    tmp_path: Path, picker: Picker, asked: dict[str, Any], message: str
) -> None:
    made: dict[str, Any] = {"tomogram": _write(tmp_path), "picks": _picks()} | asked
    item = LabelledTomogram(**made, **ROW_3)
    with pytest.raises((SourceError, FormatError), match=message):
        open_labelled([item], picker)


def test_others_of_a_star_file_are_its_other_classes(tmp_path: Path, picker: Picker) -> None:
    known: dict[str, Any] = {"voxel_size": 5.0, "shape": (40, 64, 72), "tomogram": "TS_1"}
    write_picks(_picks(np.concatenate([CENTRES, CENTRES[:1] + 12]), **known), tmp_path / "all.star")
    text = (tmp_path / "all.star").read_text().rstrip()
    *head, first, second, third = text.splitlines()
    number = sum(line.startswith("_rln") for line in head[head.index("data_particles") :]) + 1
    lines = [*head, f"_rlnClassNumber #{number}", f"{first} 1", f"{second} 1", f"{third} 2", ""]
    (tmp_path / "all.star").write_text("\n".join(lines))
    item = LabelledTomogram(_write(tmp_path), tmp_path / "all.star", 80.0, particle="1", others="*")
    (one,) = open_labelled([item], picker)
    np.testing.assert_allclose(sorted(one.picks.zyx.tolist()), sorted(CENTRES.tolist()), atol=1e-4)
    np.testing.assert_allclose(one.others, CENTRES[:1] + 12, atol=1e-4)


def test_others_that_are_all_of_this_kind_are_none(tmp_path: Path, picker: Picker) -> None:
    """A file without kinds is the kind that was asked for, and holds no other."""
    known: dict[str, Any] = {"voxel_size": 5.0, "shape": (40, 64, 72), "tomogram": "TS_1"}
    write_picks(_picks(**known), tmp_path / "plain.star")
    item = LabelledTomogram(_write(tmp_path), tmp_path / "plain.star", 80.0, particle="ribosome", others="*")
    with pytest.raises(FormatError, match=r"no other particles of 'TS_1' in .*plain\.star"):
        open_labelled([item], picker)


def test_others_of_a_file_without_other_kinds_are_refused(tmp_path: Path, picker: Picker) -> None:
    known: dict[str, Any] = {"voxel_size": 5.0, "shape": (40, 64, 72), "tomogram": "TS_1"}
    write_picks(_picks(particle="a", **known), tmp_path / "one.csv")
    item = LabelledTomogram(_write(tmp_path), tmp_path / "one.csv", 80.0, particle="a", others="*")
    with pytest.raises(FormatError, match=r"no other particles of 'TS_1' in .*one\.csv.*kinds 'a'"):
        open_labelled([item], picker)


def test_a_volume_is_sampled_as_for_the_picker_that_learns_on(tmp_path: Path, picker: Picker) -> None:
    theirs = Picker(
        build_network(picker.metadata["architecture"]), picker.metadata | {"resampling": "tomocpt"}
    )
    item = LabelledTomogram(_write(tmp_path), _picks(voxel_size=5.0), 80.0)
    (ours,), (other,) = (open_labelled([item], one) for one in (picker, theirs))
    assert ours.fingerprint != other.fingerprint
    volumes = [one.ingest(tmp_path / "volumes").volume for one in (ours, other)]
    assert [volume.rule for volume in volumes] == ["bspline", "tomocpt"]  # type: ignore[attr-defined]
    assert volumes[1].shape == other.grid.shape


def _classes(path: Path, *rows: tuple[str, int]) -> Path:
    """Write a STAR file of one particle a row, at the first centre, with a class."""
    z, y, x = CENTRES[0]
    columns = ("TomoName", "CoordinateX", "CoordinateY", "CoordinateZ", "ClassNumber")
    lines = [f"_rln{column}" for column in columns]
    lines += [f"{name} {x} {y} {z} {number}" for name, number in rows]
    path.write_text("\n".join(["", "data_particles", "", "loop_", *lines, ""]))
    return path


def test_no_tomogram_is_taught_the_particles_of_another(
    tmp_path: Path, picker: Picker, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a class that only one tomogram of a file has, the others have none."""
    path = _classes(tmp_path / "p.star", ("TS_1", 1), ("TS_1", 2), ("TS_2", 2))
    rows = [LabelledTomogram(_write(tmp_path, name), path, 80.0, particle="1") for name in ("TS_1", "TS_2")]
    first, second = open_labelled(rows, picker)
    assert (len(first.picks), len(second.picks)) == (1, 0)
    assert "TS_2.mrc: no particle in" in caplog.text
    for particle in ("", "1"):
        alone = _classes(tmp_path / "q.star", ("TS_1", 1))
        shared = [
            LabelledTomogram(_write(tmp_path, name), alone, 80.0, particle=particle)
            for name in ("TS_1", "TS_2")
        ]
        with pytest.raises(FormatError, match="0 tables for 'TS_2'"):
            open_labelled(shared, picker)
        # Alone with a file of one tomogram, a row says that it is its own, whatever it is called there.
        (own,) = open_labelled(shared[1:], picker)
        assert len(own.picks) == 1


def test_a_file_of_several_voxel_sizes_serves_each_of_its_tomograms(tmp_path: Path, picker: Picker) -> None:
    """The voxel size of a row is that of its own tomogram, and of no other in the file."""
    write_mrc(tmp_path / "coarse.mrc", _balls(CENTRES / 2, 4.0)[:20, :32, :36], 10.0)
    both = [
        _picks(tomogram="TS_1", voxel_size=5.0, shape=(40, 64, 72)),
        _picks(CENTRES / 2, tomogram="coarse", voxel_size=10.0, shape=(20, 32, 36)),
    ]
    write_picks(both, tmp_path / "both.star")
    rows = [
        LabelledTomogram(path, tmp_path / "both.star", 80.0)
        for path in (_write(tmp_path), tmp_path / "coarse.mrc")
    ]
    fine, coarse = open_labelled(rows, picker)
    np.testing.assert_allclose(fine.picks.zyx, CENTRES, atol=1e-4)
    np.testing.assert_allclose(coarse.picks.zyx, CENTRES / 2, atol=1e-4)


def test_a_file_may_call_tomograms_by_their_tilt_series(tmp_path: Path, picker: Picker) -> None:
    path = _classes(tmp_path / "p.star", ("TS_1", 1), ("TS_2", 1), ("TS_2", 1))
    names = ("rec_TS_2", "TS_1_5.00Apx")
    rows = [LabelledTomogram(_write(tmp_path, name), path, 80.0) for name in names]
    assert [len(one.picks) for one in open_labelled(rows, picker)] == [2, 1]


def test_a_tilt_series_name_of_another_size_is_no_name_of_a_tomogram(tmp_path: Path, picker: Picker) -> None:
    """Voxels that nobody says the size of are not those of a tomogram that is binned otherwise."""
    path = _classes(tmp_path / "p.star", ("TS_1_10.00Apx", 1), ("TS_2_5.00Apx", 1))
    rows = [LabelledTomogram(_write(tmp_path, f"TS_{k}_5.00Apx.rec"), path, 80.0) for k in (2, 1)]
    assert len(open_labelled(rows[:1], picker)[0].picks) == 1
    with pytest.raises(FormatError, match="0 tables for 'TS_1_5"):
        open_labelled(rows[1:], picker)
    # Not even as the only tomogram of a file that no other row names.
    _classes(path, ("TS_1_10.00Apx", 1))
    with pytest.raises(FormatError, match="0 tables for 'TS_1_5"):
        open_labelled(rows[1:], picker)
    _classes(path, ("another_name", 1))
    assert len(open_labelled(rows[1:], picker)[0].picks) == 1


@pytest.mark.parametrize("suffix", ["csv", "tsv", "star", "json", "ndjson", "mod", "coords"])
def test_a_file_without_a_byte_is_of_a_tomogram_without_a_particle(
    tmp_path: Path, picker: Picker, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"none.{suffix}").touch()
    (one,) = open_labelled([LabelledTomogram(_write(tmp_path), tmp_path / f"none.{suffix}", 80.0)], picker)
    assert len(one.picks) == 0
    assert "learnt as background" in caplog.text


def test_one_file_is_shared_however_it_is_spelt(
    tmp_path: Path, picker: Picker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_picks(_picks(tomogram="TS_1", voxel_size=5.0, shape=(40, 64, 72)), tmp_path / "one.csv")
    rows = [
        LabelledTomogram(_write(tmp_path, name), path, 80.0)
        for name, path in (("TS_1", "one.csv"), ("TS_2", str(tmp_path / "one.csv")))
    ]
    with pytest.raises(FormatError, match="0 tables for 'TS_2'"):
        open_labelled(rows, picker)


@pytest.mark.parametrize("name", ["p.csv", "p.star", "p.coords"])
def test_a_tomogram_without_particles_takes_a_file_of_none(tmp_path: Path, picker: Picker, name: str) -> None:
    none = _picks(np.zeros((0, 3)), voxel_size=5.0, tomogram="TS_1", shape=(40, 64, 72))
    write_picks(none, tmp_path / name)
    (one,) = open_labelled([LabelledTomogram(_write(tmp_path), tmp_path / name, 80.0)], picker)
    assert len(one.picks) == 0


def test_a_table_says_that_a_volume_was_not_turned_yet(
    tmp_path: Path, picker: Picker, caplog: pytest.LogCaptureFixture
) -> None:
    """IMOD's volumes have the beam along y until they are turned; picks count voxels of the file."""
    volume = np.ascontiguousarray(_balls(CENTRES).transpose(1, 0, 2)[::-1])
    write_mrc(tmp_path / "TS_1.mrc", volume, 5.0)
    (z, y, x) = CENTRES.T
    write_picks(
        _picks(np.stack([63 - y, z, x], axis=1), voxel_size=5.0, tomogram="TS_1", shape=(64, 40, 72)),
        tmp_path / "p.csv",
    )
    table = tmp_path / "table.csv"
    table.write_text("tomogram,picks,diameter,beam_axis\nTS_1.mrc,p.csv,80,\n")
    open_labelled(read_table(table), picker)
    assert "row 2 of" in caplog.text
    assert 'pass beam_axis="y" if the beam runs along y' in caplog.text
    table.write_text("tomogram,picks,diameter,beam_axis\nTS_1.mrc,p.csv,80,y\n")
    (one,) = open_labelled(read_table(table), picker)
    made = one.ingest(tmp_path / "volumes")
    assert made.volume.shape == (20, 32, 36)
    np.testing.assert_allclose(made.centres, (CENTRES + 0.5) / 2 - 0.5, atol=1e-4)
    table.write_text("tomogram,picks,diameter,beam_axis\nTS_1.mrc,p.csv,80,q\n")
    with pytest.raises(SourceError, match=r"row 2 of .*beam_axis"):
        open_labelled(read_table(table), picker)
