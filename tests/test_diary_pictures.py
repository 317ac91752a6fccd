from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tomocpt_stream import diary_pictures
from tomocpt_stream.diary_pictures import draw_curves, draw_look
from tomocpt_stream.targets import paint_box

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (10, 12, 16)
CENTRE = (4, 8, 5)
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    voxels: Array
    label: Array
    answered: Array
    known: npt.NDArray[np.bool_] | None = None
    step: int = 400
    epoch: int = 2


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw few pixels, which is quicker."""
    monkeypatch.setattr(diary_pictures, "_DPI", 30)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn, kept for a look at what is on them."""
    kept: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **settings: Any) -> None:
        kept.append(self)
        save(self, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def label(centre: tuple[int, int, int] = CENTRE) -> Array:
    z, y, x = SHAPE
    box = (slice(0, z), slice(0, y), slice(0, x))
    return paint_box(np.array([centre], dtype=float), box, radius=5.0, label="gaussian").astype(np.float32)


def noise(seed: int) -> Array:
    return np.random.default_rng(seed).random(SHAPE, dtype=np.float32)


def images(figure: Figure) -> list[list[Any]]:
    """Return the images of each panel, rows first, without the colour bar."""
    return [list(axis.get_images()) for axis in figure.axes[:9]]


def test_a_look_shows_all_three_volumes_through_the_particle(tmp_path: Path, figures: list[Figure]) -> None:
    look = Look(noise(0), label(), noise(1))
    draw_look(look, tmp_path / "looks" / "a.png")
    assert [path.name for path in (tmp_path / "looks").iterdir()] == ["a.png"]
    assert np.ptp(imread(tmp_path / "looks" / "a.png")[..., :3]) == pytest.approx(1.0)
    z, y, x = CENTRE
    for row, volume in enumerate((look.voxels, look.label, look.answered)):
        panels = images(figures[0])[3 * row : 3 * row + 3]
        wanted = (volume[z], volume[:, y], volume[:, :, x].T)
        for (image,), slice_ in zip(panels, wanted, strict=True):
            np.testing.assert_array_equal(image.get_array(), slice_)
    assert [axis.get_title() for axis in figures[0].axes[:3]] == ["z = 4", "y = 8", "x = 5"]


def test_label_and_answer_share_the_colours_of_0_to_1(tmp_path: Path, figures: list[Figure]) -> None:
    draw_look(Look(noise(0), 0.1 * label(), 0.2 * noise(1)), tmp_path / "a.png")
    for (image,) in images(figures[0])[3:]:
        assert image.get_clim() == (0, 1)
        assert image.get_cmap().name == "magma"


def test_slices_go_through_the_middle_where_there_is_no_particle(
    tmp_path: Path, figures: list[Figure]
) -> None:
    draw_look(Look(noise(0), np.zeros(SHAPE, np.float32), noise(1)), tmp_path / "a.png")
    np.testing.assert_array_equal(images(figures[0])[6][0].get_array(), noise(1)[5])
    # Of several particles the one nearest to the middle.
    draw_look(Look(noise(0), np.maximum(label((1, 1, 1)), label((6, 5, 8))), noise(1)), tmp_path / "b.png")
    assert [axis.get_title() for axis in figures[1].axes[:3]] == ["z = 6", "y = 5", "x = 8"]


def test_voxels_of_unknown_truth_are_tinted(tmp_path: Path, figures: list[Figure]) -> None:
    known = np.ones(SHAPE, bool)
    known[:, :3] = False
    draw_look(Look(noise(0), label(), noise(1), known), tmp_path / "a.png")
    for across, panel in enumerate(images(figures[0])[3:6]):
        tint = np.ma.getmaskarray(panel[1].get_array())
        wanted = (known[CENTRE[0]], known[:, CENTRE[1]], known[:, :, CENTRE[2]].T)[across]
        np.testing.assert_array_equal(tint, wanted)
    texts = [text.get_text() for legend in figures[0].legends for text in legend.get_texts()]
    assert "truth unknown" in texts
    draw_look(Look(noise(0), label(), noise(1), np.ones(SHAPE, bool)), tmp_path / "b.png")
    texts = [text.get_text() for legend in figures[1].legends for text in legend.get_texts()]
    assert "truth unknown" not in texts


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 3e38])
def test_a_network_gone_astray_is_drawn(tmp_path: Path, value: float) -> None:
    volume = np.full(SHAPE, value, np.float32)
    draw_look(Look(volume, label(), volume, np.zeros(SHAPE, bool)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def table(steps: int, **columns: Any) -> pd.DataFrame:
    step = np.arange(1.0, steps + 1)
    plain = {"step": step, "loss": 1 / step, "validation": np.nan, "learning_rate": 1e-3}
    return pd.DataFrame(plain | columns)


def test_curves_show_the_loss_and_the_best_validation(tmp_path: Path, figures: list[Figure]) -> None:
    validation = np.where(np.arange(1, 41) % 10 == 0, np.abs(np.arange(1, 41) - 29) + 0.5, np.nan)
    draw_curves(table(40, validation=validation), tmp_path / "curves.png")
    upper, lower = figures[0].axes
    loss, validated, best = (np.asarray(line.get_data(), dtype=float) for line in upper.get_lines())
    np.testing.assert_allclose(loss, [np.arange(1, 41), 1 / np.arange(1.0, 41)])
    np.testing.assert_array_equal(validated, [[10, 20, 30, 40], [19.5, 9.5, 1.5, 11.5]])
    np.testing.assert_array_equal(best, [[30], [1.5]])
    assert (upper.get_yscale(), lower.get_yscale()) == ("log", "log")
    np.testing.assert_array_equal(lower.get_lines()[0].get_ydata(), np.full(40, 1e-3))


def test_a_long_run_is_drawn_as_means_with_their_range(tmp_path: Path, figures: list[Figure]) -> None:
    loss = np.tile([1.0, 3.0], 2000)
    draw_curves(table(4000, loss=loss), tmp_path / "curves.png")
    upper = figures[0].axes[0]
    drawn = np.asarray(upper.get_lines()[0].get_ydata(), dtype=float)
    np.testing.assert_allclose(drawn, np.full(400, 2.0))
    assert upper.collections[0].get_datalim(upper.transData).intervaly == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize(
    "columns",
    [
        {"loss": np.nan},
        {"loss": 0.0},
        {"loss": -1.0, "learning_rate": 0.0},
        {"loss": np.inf, "validation": np.inf, "learning_rate": np.nan},
    ],
)
def test_curves_of_numbers_that_have_no_logarithm_are_drawn(
    tmp_path: Path, columns: dict[str, float]
) -> None:
    draw_curves(table(3, **columns), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    draw_curves(table(0, **columns), tmp_path / "none.png")
