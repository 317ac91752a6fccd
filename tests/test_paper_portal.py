"""The manifests of the paper's experiments: what the dry run checks, and that it does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from tomocpt_stream.errors import PortalError

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "paper_portal" / "paper_portal.py"


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_portal", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_portal"] = module
    spec.loader.exec_module(module)
    return module


def _named(paper: ModuleType, name: str) -> Any:
    return next(one for one in paper.read_experiments() if one.name == name)


def test_every_command_parses_without_a_network(
    paper: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    paper.main(["--dry-run"])
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("# ")] == [
        *("# base", "# apoferritin", "# spike", "# rubisco")
    ]
    assert "learns from dataset 10003: annotations of *ribosome*" in said
    assert "learns from dataset 10006: annotations of *spike*" in said
    assert "--batch-size 10 --learning-rate 0.0004 --weight-decay 1e-10" in said


def test_the_numbers_are_the_papers(paper: ModuleType) -> None:
    base = _named(paper, "base")
    words = base.steps[1].words(base.values() | {"folder": "x"})
    parameters = {name: paper.parse(words)[name] for name in ("batch_size", "learning_rate", "weight_decay")}
    assert parameters == {"batch_size": 10, "learning_rate": 4e-4, "weight_decay": 1e-10}
    queries = [paper.read_query(text) for text in paper.parse(words)["portal"]]
    assert [(one.dataset, one.diameter, one.test) for one in queries] == [
        (("10003",), 250.0, 5),
        (("10006",), 240.0, 5),
    ]
    rubisco = _named(paper, "rubisco")
    text = next(line for line in paper.check(rubisco) if "finetune" in line)
    for part in ("--epochs 20", "--learning-rate 5e-05", "voxel_spacing=8.832", "--truth truth"):
        assert part in text
    assert "run=lma2019-08-21-1,lma2019-08-21-10,lma2019-08-21-11,lma2019-08-21-2,lma2019-08-21-6" in text
    thresholds = [
        one.facts[name]["value"]
        for one in paper.read_experiments()
        for name in ("keep", "threshold")
        if name in one.facts
    ]
    assert {0.3, 0.4, 0.7} == set(thresholds)


def test_the_handover_has_the_papers_pixel_size_and_box(paper: ModuleType) -> None:
    found = {one.name: paper.check(one) for one in paper.read_experiments()}
    (line,) = [line for line in found["apoferritin"] if line.startswith("WarpTools ts_export_particles")]
    assert "--coords_angpix 8 " in line
    assert "--output_angpix 4 --box 64 --diameter 130" in line
    (line,) = [line for line in found["spike"] if line.startswith("WarpTools")]
    assert "--output_angpix 8 --box 42 --diameter 240" in line


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("finetune nowhere.csv --folder a --output b.safetensors", click.UsageError, "does not exist"),
        ("pick truth --diameter wide", click.UsageError, "not a valid float"),
        ("train --portal 'dataset=1 object=a' --folder a --output b", PortalError, "without a diameter"),
        ("train --portal 'dataset=1 diameter=9' --folder a --output b", PortalError, "without a truth"),
        ("pick truth --diameter {width}", KeyError, "width"),
    ],
)
def test_the_dry_run_finds_mistakes(
    paper: ModuleType, command: str, error: type[Exception], message: str
) -> None:
    one = paper.Experiment("mine", "", "", {}, (paper.Step(command),), {"truth": ""})
    with pytest.raises(error, match=message):
        paper.check(one)


def test_steps_that_were_done_are_not_done_again(
    paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def fake(words: list[str], *, check: bool) -> None:
        assert check
        ran.append(words[3:])
        if "second" in words:
            raise KeyboardInterrupt

    monkeypatch.setattr(paper.subprocess, "run", fake)
    steps = (paper.Step("first {tomograms} --output {folder}/a"), paper.Step("second"))
    one = paper.Experiment("mine", "", "", {}, steps, {"tomograms": "a glob"})
    for name in ("TS_1.mrc", "TS_2.mrc"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="--file tomograms="):
        paper.run(one, tmp_path, {})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            paper.run(one, tmp_path, {"tomograms": f"{tmp_path}/*.mrc"})
    both = [str(tmp_path / "TS_1.mrc"), str(tmp_path / "TS_2.mrc")]
    assert ran == [["first", *both, "--output", str(tmp_path / "mine" / "a")], ["second"], ["second"]]
