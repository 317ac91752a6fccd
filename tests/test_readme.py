"""The README: its example runs, its commands parse, its tables name every format, option and module."""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import tomocpt_stream
from tests.blobs import NamedBlobPicker, blobs
from tomocpt_stream.__main__ import main
from tomocpt_stream.formats import FORMATS, read_picks
from tomocpt_stream.phantom import write_mrc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for line in README.splitlines() if line.startswith("tomocpt-stream ")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, _ = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tomocpt_stream, "load_picker", lambda source: NamedBlobPicker())
    centres = np.array([[8.0, 10.0, 9.0], [20.0, 30.0, 33.0]])
    # 290 Å over the 8 voxels that the stand-in expects
    write_mrc("TS_01.mrc", blobs((30, 50, 44), centres), 290 / 8)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("2 ")
    found = read_picks("TS_01.star")["TS_01"]
    assert sorted(np.round(found.zyx).tolist()) == centres.tolist()


def test_the_example_on_a_cluster_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, example = blocks("python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tomocpt_stream, "load_picker", NamedBlobPicker)
    monkeypatch.setattr("tomocpt_stream.cluster.local_cluster", nullcontext)
    centres = np.array([[8.0, 10.0, 9.0], [20.0, 30.0, 33.0]])
    write_mrc("TS_01.mrc", blobs((30, 50, 44), centres), 290 / 8)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(example, "README.md", "exec"), names)
    assert sorted(np.round(names["picks"].zyx).tolist()) == centres.tolist()


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ribosomes.json", "tomograms.star", "mine.csv"):
        Path(name).touch()
    name, *words = shlex.split(line, comments=True)[1:]
    command = main.commands[name]
    if isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    context = command.make_context(name, list(words))
    assert context.params


def test_the_options_of_the_table_are_those_of_the_command() -> None:
    options = {name for parameter in main.commands["pick"].params for name in parameter.opts}
    named = set(re.findall(r"^\| `(--[a-z-]+)` \|", README, flags=re.MULTILINE))
    assert len(named) >= 6
    assert named <= options


def test_every_module_is_in_the_table() -> None:
    package = Path(tomocpt_stream.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"} | {"formats"}
    rows = re.findall(
        r"^\| ((?:`\w+` ?)+)\|",
        (ROOT / "ARCHITECTURE.md").read_text().split("## Modules")[1].split("## ")[0],
        flags=re.MULTILINE,
    )
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(named) == len(set(named))
    assert set(named) == modules


def test_every_format_is_in_the_table() -> None:
    rows = re.findall(
        r"^\| ((?:`[\w-]+` ?)+)\| `\.", README.split("## Coordinate files")[1], flags=re.MULTILINE
    )
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted(set(FORMATS) - {"imod_slicer"})


def test_every_module_of_the_formats_is_in_its_table() -> None:
    folder = Path(tomocpt_stream.__file__).parent / "formats"
    table = (ROOT / "ARCHITECTURE.md").read_text().split("## Formats")[1]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)))
    assert sorted(named) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 190


@pytest.mark.parametrize("name", re.findall(r"`make (\w+)`|^    make (\w+)", README, flags=re.MULTILINE))
def test_the_targets_of_make_are_there(name: tuple[str, str]) -> None:
    assert re.search(rf"^{''.join(name)}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
