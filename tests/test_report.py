"""Pictures: which voxels are read, where circles lie, what a file looks like when it is there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from tomocpt_stream import report
from tomocpt_stream.errors import SourceError
from tomocpt_stream.evaluation import Match
from tomocpt_stream.picks import Picks
from tomocpt_stream.tomogram import Tomogram, open_tomogram

SHAPE = (24, 60, 48)


def volume(shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def tomogram(**settings: Any) -> Tomogram:
    return open_tomogram(volume(), voxel_size=10.0, name="grid 3", **settings)


def picks(*zyx: tuple[float, float, float]) -> Picks:
    return Picks(
        np.array(zyx, dtype=float).reshape(-1, 3), np.ones(len(zyx), dtype=np.float32), voxel_size=10.0
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn, kept for a look at what is on them."""
    kept: list[Figure] = []
    save = report._save

    def keep(figure: Figure, path: Path, dpi: int) -> Path:
        kept.append(figure)
        return save(figure, path, dpi)

    monkeypatch.setattr(report, "_save", keep)
    return kept


def circles(figure: Figure, panel: int) -> dict[tuple[float, float], float]:
    """Return the diameter of every circle of a panel by its centre (x, y of the panel)."""
    found = [item for item in figure.axes[panel].collections if isinstance(item, EllipseCollection)]
    offsets = np.asarray(found[0].get_offsets(), dtype=float).tolist()
    widths = np.asarray(found[0].get_widths(), dtype=float).tolist()
    return {(x, y): width for (x, y), width in zip(offsets, widths, strict=True)}


def test_a_picture_is_a_whole_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = report.draw_picks(tomogram(), picks((12, 30, 20)), tmp_path / "new" / "a.png", diameter=120)
    assert [item.name for item in path.parent.iterdir()] == ["a.png"]
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 400
    assert np.ptp(image[..., :3]) == pytest.approx(1.0)


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self: Figure, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        report.draw_picks(tomogram(), picks(), path, diameter=120)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_circles_are_cuts_through_spheres(tmp_path: Path, figures: list[Figure]) -> None:
    here = picks((12, 30, 20), (12 + 4, 10, 40), (12 + 6, 50, 40))
    report.draw_picks(tomogram(), here, tmp_path / "a.png", diameter=120, centre=(12, 30, 20))
    # the radius is 6 voxels: 4 away from the slice it is sqrt(36 - 16), 6 away there is nothing left
    assert circles(figures[0], 0) == pytest.approx({(20, 30): 12, (40, 10): 2 * np.sqrt(20)})
    assert circles(figures[0], 1) == pytest.approx({(20, 12): 12})
    assert circles(figures[0], 2) == pytest.approx({(12, 30): 12})


def test_slices_are_means_of_a_quarter_diameter(tmp_path: Path, figures: list[Figure]) -> None:
    report.draw_picks(tomogram(), picks(), tmp_path / "a.png", diameter=120, centre=(12, 30, 20))
    xy, xz, zy = (np.asarray(axis.images[0].get_array()) for axis in figures[0].axes)
    whole = volume()
    np.testing.assert_allclose(xy, whole[11:14].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(xz, whole[:, 29:32].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(zy, whole[:, :, 19:22].mean(axis=2).T, atol=1e-6)


def test_the_axes_have_one_scale_and_share_edges(tmp_path: Path, figures: list[Figure]) -> None:
    report.draw_picks(tomogram(), picks(), tmp_path / "a.png", diameter=120)
    figure = figures[0]
    wide, high = figure.get_size_inches()
    scales = []
    for axis in figure.axes:
        box = axis.get_position()
        scales += [
            box.width * wide / np.ptp(axis.get_xlim()),
            box.height * high / np.ptp(axis.get_ylim()),
        ]
    np.testing.assert_allclose(scales, scales[0], rtol=1e-6)
    xy, xz, zy = (axis.get_position() for axis in figure.axes)
    assert (xy.x0, xy.x1) == pytest.approx((xz.x0, xz.x1))
    assert (xy.y0, xy.y1) == pytest.approx((zy.y0, zy.y1))


def test_the_picture_says_what_it_shows(tmp_path: Path, figures: list[Figure]) -> None:
    report.draw_picks(tomogram(), picks((12, 30, 20)), tmp_path / "a.png", diameter=120)
    texts = " ".join(text.get_text() for text in figures[0].texts)
    assert "grid 3" in texts
    assert "1 pick · circles of 120 Å · slices 30 Å thick" in texts
    labels = {axis.get_xlabel() for axis in figures[0].axes} | {axis.get_ylabel() for axis in figures[0].axes}
    assert labels >= {"x (voxels)", "y (voxels)", "z (voxels)"}
    assert any("100 Å" in text.get_text() for text in figures[0].axes[0].texts)


def test_only_the_slices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tomogram()
    seen = np.zeros(SHAPE, dtype=bool)
    read = source.read

    def watched(box: tuple[slice, slice, slice]) -> npt.NDArray[np.float32]:
        seen[box] = True
        return read(box)

    monkeypatch.setattr(source, "read", watched)
    report.draw_picks(source, picks(), tmp_path / "a.png", diameter=120, centre=(12, 30, 20))
    wanted = np.zeros(SHAPE, dtype=bool)
    wanted[11:14] = wanted[:, 29:32] = wanted[:, :, 19:22] = True
    np.testing.assert_array_equal(seen, wanted)


def test_a_thick_slab_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tomogram()
    sizes: list[int] = []
    read = source.read

    def watched(box: tuple[slice, slice, slice]) -> npt.NDArray[np.float32]:
        found = read(box)
        sizes.append(found.size)
        return found

    monkeypatch.setattr(source, "read", watched)
    monkeypatch.setattr(report, "_SLAB_VOXELS", 3 * 60 * 48)
    mean = report.mean_slice(source, 0, slice(2, 20))
    assert sizes == [3 * 60 * 48] * 6
    np.testing.assert_allclose(mean, volume()[2:20].mean(axis=0), atol=1e-6)


def test_picks_of_an_unturned_volume_are_drawn_in_the_axes_as_read(
    tmp_path: Path, figures: list[Figure]
) -> None:
    source = tomogram(beam_axis="y")
    here = source.frame.to_file([[30.0, 10.0, 20.0]])
    report.draw_picks(source, picks(*here), tmp_path / "a.png", diameter=120)
    assert circles(figures[0], 0) == pytest.approx({(20, 10): 12})


def test_the_slices_go_where_most_picks_are() -> None:
    points = np.array([[2, 5, 5], [20, 50, 40], [21, 52, 41], [19, 51, 39]], dtype=float)
    assert report.busiest(points, SHAPE, 4.0) == (20, 51, 40)
    crowd = np.random.default_rng(5).uniform(0, 24, size=(40, 3))
    gaps = crowd[:, None, :] - crowd[None, :, :]
    areas = np.maximum(0, 16 - gaps**2).sum(axis=0)
    best = [crowd[areas[:, axis].argmax(), axis] for axis in range(3)]
    np.testing.assert_allclose(report.busiest(crowd, (24, 24, 24), 4.0), np.clip(best, 0, 23))
    assert report.busiest(np.zeros((0, 3)), SHAPE, 4.0) == (11.5, 29.5, 23.5)


def test_a_pick_at_the_face_is_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    report.draw_picks(tomogram(), picks((-0.3, 59.4, 0)), tmp_path / "a.png", diameter=120)
    assert len(circles(figures[0], 0)) == 1


@pytest.mark.parametrize("shape", [(1, 9, 7), (40, 12, 300), (200, 8, 8)])
def test_any_shape_can_be_drawn(shape: tuple[int, int, int], tmp_path: Path) -> None:
    source = open_tomogram(
        np.zeros(shape, dtype=np.int8), voxel_size=10.0, name="a name far longer than wide" * 3
    )
    assert report.draw_picks(source, picks((0, 3, 3)), tmp_path / "a.png", diameter=90).exists()
    assert report.draw_size(source, 90, tmp_path / "b.png").exists()


def test_the_size_is_a_circle_in_the_middle(tmp_path: Path, figures: list[Figure]) -> None:
    report.draw_size(tomogram(), 120, tmp_path / "a.png")
    assert circles(figures[0], 0) == pytest.approx({(23.5, 29.5): 12})
    assert "12.0 voxels of 10 Å" in " ".join(text.get_text() for text in figures[0].texts)


@pytest.mark.parametrize("diameter", [0.0, -1.0, float("nan"), float("inf")])
def test_a_diameter_that_is_no_length_is_refused(diameter: float, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="diameter"):
        report.draw_size(tomogram(), diameter, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_curve_shows_its_columns_and_the_match(tmp_path: Path, figures: list[Figure]) -> None:
    match = Match(np.array([[0, 0]]), np.array([3.0]), 4, 2)
    columns = {"threshold": [0.1, 0.2, 0.9], "picks": [9, 4, 0], "precision": [0.2, 0.25, 0.0]}
    curve = pd.DataFrame({**columns, "recall": [0.9, 0.5, 0.0], "fbeta": [0.3, 0.4, 0.0]})
    report.draw_curve(curve, tmp_path / "curve.png", match=match, title="one", at=0.2, beta=2)
    left, right = figures[0].axes
    lines = [np.asarray(line.get_xydata()).tolist() for line in left.lines]
    assert lines == [[[0.9, 0.2], [0.5, 0.25]], [[0.5, 0.25]]]  # recall, precision; without the empty row
    named = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in right.lines[:3]}
    assert named["precision"] == [[0.1, 0.2], [0.2, 0.25]]
    assert named["recall"] == [[0.1, 0.9], [0.2, 0.5]]
    assert named["F2"] == [[0.1, 0.3], [0.2, 0.4]]
    assert np.asarray(right.lines[3].get_xdata()).tolist() == [0.2, 0.2]
    assert left.get_title() == "precision 0.250, recall 0.500"


def test_a_curve_is_drawn_whatever_its_length(tmp_path: Path) -> None:
    match = Match(np.array([[0, 0]]), np.array([3.0]), 2, 2)
    for rows in (0, 1, 7, 500):
        ramp = np.linspace(0, 1, rows)
        columns = {"threshold": ramp, "picks": np.arange(rows), "precision": ramp, "recall": 1 - ramp}
        columns["fbeta"] = ramp
        at = 0.5 if rows else None
        path = report.draw_curve(
            pd.DataFrame(columns), tmp_path / "a" / "curve.png", match=match, title="$x", at=at
        )
        pixels = matplotlib.image.imread(path)[..., :3] * 255
        orange = (np.abs(pixels - (0xD5, 0x5E, 0x00)).sum(axis=2) < 30).sum()
        assert orange > 100  # the mark of the match, and F where there is a curve
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["curve.png"]
