"""What the commands show: lines of facts, rates, bars only where somebody looks."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest

from tomocpt_stream.blocks import Window, plan_blocks
from tomocpt_stream.errors import SourceError
from tomocpt_stream.frame import working_grid
from tomocpt_stream.terminal import (
    count,
    fact_lines,
    facts_line,
    pace,
    plan_line,
    progress_bar,
    rate,
    say_failure,
    show_warning,
)
from tomocpt_stream.tomogram import open_tomogram


def test_lines_carry_their_units() -> None:
    tomogram = open_tomogram(np.zeros((10, 20, 30), np.float32), voxel_size=12.5, name="TS")
    assert facts_line(tomogram) == "TS: 10 x 20 x 30 (zyx) = 6,000 voxels of 12.5 Å"
    assert rate(tomogram, 2.0) == "3,000 voxels/s"
    grid = working_grid((100, 100, 100), 10.0, 14.5)
    plan = plan_blocks(grid.shape, Window())
    line = plan_line(grid, plan)
    assert "working voxel size 14.5 Å" in line
    assert f"{plan.windows} windows of 64 x 64 x 64" in line
    assert f"{plan.passes_per_voxel:.2f} passes per voxel" in line
    assert f"{plan.projected_bytes / 1e9:.2f} GB" in line


def test_facts_stand_in_columns_with_their_units() -> None:
    facts = {
        "name": "TS",
        "shape": [10, 20, 30],
        "voxel_size": 12.50,
        "stated_voxel_sizes": [12.5, 12.5, 12.25],
        "axis_order": [1, 2, 3],
        "extended_header_type": "",
        "labels": ["first", "second"],
    }
    assert list(fact_lines(facts)) == [
        "name                  TS",
        "shape                 10 x 20 x 30 voxels (z, y, x)",
        "voxel size            12.5 Å",
        "stated voxel sizes    12.5, 12.5, 12.25 Å",
        "axis order            1, 2, 3",
        "extended header type  none",
        "labels                first",
        "                      second",
    ]
    assert list(fact_lines({})) == []


def test_numbers_read_as_words() -> None:
    assert [count(number, "pick") for number in (0, 1, 2)] == ["0 picks", "1 pick", "2 picks"]
    assert pace(0, 1.0, "steps") == pace(5, 0.0, "steps") == ""
    assert pace(3, 2.0, "steps") == "1.5 steps/s"
    assert pace(5_000_000, 2.0, "voxels") == "2.50 M voxels/s"


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        progress("predict", 1, 2)
        progress("predict", 2, 2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_bar_with_rate_and_time_left_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar() as progress:
        for done in range(0, 11_000_000, 1_000_000):
            progress("predict", done, 10_000_000)
        progress("train", 1, 2)
        progress("train", 2, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "predict" in captured.err
    assert "100%" in captured.err
    assert "M voxels/s" in captured.err
    assert "steps/s" in captured.err
    assert "0:00:00" in captured.err


def test_a_foreseen_failure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say_failure("a.mrc", SourceError("found", expected="wanted", remedy="do this"))
    assert capsys.readouterr().err == "a.mrc: SourceError: found; expected wanted; do this\n"


def test_an_unforeseen_failure_comes_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 // 0
    say_failure("a.mrc", caught.value)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("a.mrc: ZeroDivisionError: integer division or modulo by zero\n")


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show_warning)
        warnings.warn("a voxel size of exactly 1 Å", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: a voxel size of exactly 1 Å\n"
