from __future__ import annotations

import csv
import logging
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.image import imread

from tomocpt_stream import diary, diary_pictures
from tomocpt_stream.diary import COLUMNS, Diary, read_curves

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

STEPS = 40


@dataclass(frozen=True)
class Step:
    step: int
    steps: int = STEPS
    epoch: int = 1
    loss: float = 0.5
    weighted: float = 0.25
    gradient: float = 0.025
    norm: float = 1.5
    learning_rate: float = 1e-3
    validation: float | None = None
    seconds: float = 0.125
    waited: float = 0.0


@dataclass(frozen=True)
class Look:
    step: int
    epoch: int
    voxels: Any = None
    label: Any = None
    answered: Any = None
    known: Any = None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures that were drawn, none of which is."""
    names: list[str] = []

    def draw(_: Any, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        names.append(path.name)

    monkeypatch.setattr(diary, "draw_look", draw)
    monkeypatch.setattr(diary, "draw_curves", draw)
    return names


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What TensorBoard was told, by a stand-in of it."""
    told: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, *, purge_step: int) -> None:
            told.append(("open", folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            told.append((tag, value, step))

        def add_image(self, tag: str, image: Any, step: int, *, dataformats: str) -> None:
            told.append((tag, image.shape, image.dtype, step, dataformats))

        def flush(self) -> None:
            told.append(("flush",))

        def close(self) -> None:
            told.append(("close",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return told


def quiet(folder: Path, **settings: Any) -> Diary:
    return Diary(folder, **({"tensorboard": False} | settings))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows(folder)]


def test_a_step_is_a_row(tmp_path: Path, drawn: list[str]) -> None:
    kept = quiet(tmp_path / "new")
    kept.step(Step(1, loss=1 / 3))
    kept.step(Step(2, validation=0.75, epoch=2))
    lines = (tmp_path / "new" / "curves.csv").read_bytes().split(b"\n")
    assert lines[0].decode() == ",".join(COLUMNS)
    assert lines[1] == b"1,1,0.333333333,0.25,0.025,1.5,0.001,,0.125,0"
    assert lines[2] == b"2,2,0.5,0.25,0.025,1.5,0.001,0.75,0.125,0"
    assert lines[3:] == [b""]
    table = read_curves(kept.table)
    assert list(table.columns) == list(COLUMNS)
    np.testing.assert_array_equal(table["validation"], [np.nan, 0.75])


def test_a_step_that_does_not_say_leaves_its_cell_empty(tmp_path: Path, drawn: list[str]) -> None:
    @dataclass(frozen=True)
    class Bare:
        step: int = 1
        steps: int = 9
        loss: float = 0.5
        validation: float | None = None

    quiet(tmp_path).step(Bare())
    assert {name: cell for name, cell in rows(tmp_path)[0].items() if cell} == {"step": "1", "loss": "0.5"}


@pytest.mark.parametrize("process", ["another", "the same"])
def test_a_run_that_goes_on_from_an_earlier_step_doubles_none(
    tmp_path: Path, process: str, drawn: list[str]
) -> None:
    first = quiet(tmp_path)
    for step in range(1, 8):
        first.step(Step(step, loss=1.0))
    after = quiet(tmp_path) if process == "another" else first
    for step in (5, 6):
        after.step(Step(step, loss=2.0))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in rows(tmp_path)] == [1.0] * 4 + [2.0] * 2


def test_a_run_that_goes_on_where_it_ended_keeps_all(tmp_path: Path, drawn: list[str]) -> None:
    quiet(tmp_path).step(Step(1))
    before = (tmp_path / "curves.csv").read_bytes()
    quiet(tmp_path).step(Step(2))
    assert (tmp_path / "curves.csv").read_bytes().startswith(before)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "torn",
    [
        b"2,1,0.5",
        b"2,1,0.5,0.25,0.025,1.5,0.001,,0.125,0",
        b"2,1,x,,,,,,,\n",
        b"2,1\n",
        b"\xff\0\n",
        b"2" + b"," * 11 + b"\n",
        b"\0" * 200_000,
        b",1,0.5,,,,,,,\n",
    ],
)
def test_what_a_killed_writer_tore_is_dropped(tmp_path: Path, torn: bytes, drawn: list[str]) -> None:
    quiet(tmp_path).step(Step(1))
    with (tmp_path / "curves.csv").open("ab") as file:
        file.write(torn)
    quiet(tmp_path).step(Step(3))
    assert steps(tmp_path) == [1, 3]
    assert read_curves(tmp_path / "curves.csv")["step"].tolist() == [1, 3]


def test_a_table_of_fewer_columns_gets_the_others(tmp_path: Path, drawn: list[str]) -> None:
    (tmp_path / "curves.csv").write_text("loss,step,old\n0.5,1,7\n0.25,2,7\n")
    quiet(tmp_path).step(Step(2))
    assert [row["loss"] for row in rows(tmp_path)] == ["0.5", "0.5"]
    assert [row["norm"] for row in rows(tmp_path)] == ["", "1.5"]


def test_a_file_of_somebody_else_is_kept(tmp_path: Path, drawn: list[str]) -> None:
    (tmp_path / "curves.csv").write_text("x,y\n1,2\n")
    quiet(tmp_path).step(Step(1))
    assert steps(tmp_path) == [1]
    assert (tmp_path / "curves.csv~").read_text() == "x,y\n1,2\n"


def test_a_table_that_is_taken_away_is_begun_again(tmp_path: Path, drawn: list[str]) -> None:
    kept = quiet(tmp_path)
    kept.step(Step(1))
    (tmp_path / "curves.csv").unlink()
    kept.step(Step(2))
    assert steps(tmp_path) == [2]


def test_curves_are_drawn_at_each_validation_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def draw(table: pd.DataFrame, path: Path) -> None:
        assert path == tmp_path / "curves.png"
        lengths.append(len(table))

    monkeypatch.setattr(diary, "draw_curves", draw)
    kept = quiet(tmp_path)
    for step in range(1, STEPS + 1):
        kept.step(Step(step, validation=0.5 if step % 16 == 0 else None))
    assert lengths == [16, 32, STEPS]
    lengths.clear()
    monkeypatch.setattr(diary, "_REDRAWN", 10)
    kept = quiet(tmp_path)
    for step in range(1, 26):
        kept.step(Step(step))
    assert lengths == [10, 20]


def test_the_first_the_last_and_each_few_epochs_looks_are_drawn(tmp_path: Path, drawn: list[str]) -> None:
    kept = quiet(tmp_path, every=3)
    for epoch in range(1, 9):
        step = 5 * epoch
        kept.step(Step(step, epoch=epoch))
        kept.look(Look(step, epoch))
    looks = [name for name in drawn if name.startswith("step")]
    assert looks == ["step_000005.png", "step_000015.png", "step_000030.png", "step_000040.png"]
    drawn.clear()
    # A part of the run that goes on draws what the whole would have drawn.
    after = quiet(tmp_path, every=3)
    for epoch in (4, 5, 6):
        after.look(Look(5 * epoch, epoch))
    assert drawn == ["step_000030.png"]


def test_no_run_ends_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, drawn: list[str]
) -> None:
    kept = quiet(tmp_path / "file")
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        kept.step(Step(1, validation=1.0))
        kept.step(Step(2))
    assert len(caplog.messages) == 1
    assert str(tmp_path / "file") in caplog.text
    (tmp_path / "file").unlink()  # there is room again
    kept.step(Step(3))
    assert steps(tmp_path / "file") == [3]


def test_no_run_ends_for_a_table_that_somebody_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, drawn: list[str]
) -> None:
    kept = quiet(tmp_path)
    kept.step(Step(1))
    with (tmp_path / "curves.csv").open("a") as file:
        file.write("a remark\n")
    with caplog.at_level(logging.WARNING):
        kept.step(Step(2, validation=1.0))
    assert "is not whole" in caplog.text
    caplog.clear()
    # The next part of the run drops it.
    quiet(tmp_path).step(Step(3, validation=1.0))
    assert steps(tmp_path) == [1, 2, 3]
    assert not caplog.messages


def test_events_are_told_where_tensorboard_is(
    tmp_path: Path, events: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diary_pictures, "_DPI", 20)
    rng = np.random.default_rng(0)
    crop = rng.random((8, 8, 8), dtype=np.float32)
    kept = Diary(tmp_path)
    kept.step(Step(38))
    kept.step(Step(39, validation=0.75))
    kept.look(Look(39, 5, crop, crop, crop))
    kept.step(Step(STEPS))
    kept.look(Look(STEPS, 5, crop, crop, crop))
    opened = [one for one in events if one[0] == "open"]
    # What an earlier part of the run told of steps that are done again is void; a look voids no step.
    assert opened == [
        ("open", str(tmp_path / "tensorboard"), 38),
        ("open", str(tmp_path / "tensorboard"), 41),
    ]
    assert ("loss/training", 0.5, 38) in events
    assert [one[1:] for one in events if one[0] == "loss/validation"] == [(0.75, 39)]
    shape = imread(tmp_path / "looks" / "step_000039.png").shape
    assert ("look", (*shape[:2], 3), np.uint8, 39, "HWC") in events
    assert events.index(("close",)) > events.index(("loss/training", 0.5, STEPS))


def test_nothing_is_said_where_tensorboard_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, drawn: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    kept = Diary(tmp_path)
    kept.step(Step(1))
    kept.step(replace(Step(2), validation=0.5))
    assert caplog.messages == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.csv", "curves.png"]
