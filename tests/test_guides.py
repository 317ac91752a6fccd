"""The guide to training and the model card say what the code and the weights are."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import tomocpt_stream
from tomocpt_stream import load_picker
from tomocpt_stream.__main__ import main
from tomocpt_stream.training_table import _COLUMNS

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "TRAINING.md").read_text()
WEIGHTS = Path(tomocpt_stream.__file__).parent / "weights"
CARD = (WEIGHTS / "base.md").read_text()


def test_the_guide_names_every_column_of_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", GUIDE.split("## The table")[1].split("## ")[0], flags=re.MULTILINE)
    assert rows == list(_COLUMNS)


def test_the_guide_names_options_that_are_there() -> None:
    options = {
        name
        for command in ("train", "finetune", "pick", "portal", "evaluate")
        for parameter in getattr(main.commands[command], "commands", {command: main.commands[command]})[
            "pick" if command == "portal" else command
        ].params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(--[a-z][a-z-]+)", GUIDE))
    assert len(named) > 8
    assert named <= options


def test_the_card_is_of_the_weights_that_ship() -> None:
    file = WEIGHTS / "base.safetensors"
    picker = load_picker("base")
    kept = picker.metadata["provenance"]
    assert picker.fingerprint in CARD
    assert hashlib.sha256(file.read_bytes()).hexdigest() in CARD
    assert f"{file.stat().st_size / 1e6:.1f} MB" in CARD
    assert file.stat().st_size < 40e6
    assert kept["command"] in CARD
    assert f"{kept['tomograms']} with {kept['particles']} particles" in CARD
    assert f"F1 {kept['calibration']['f1']:.3f} there" in CARD
    sizes = picker.metadata["architecture"]
    assert f"feature size {sizes['feature_size']}, attention windows of {sizes['window']}" in CARD


def test_the_card_quotes_the_result_page() -> None:
    (name,) = re.findall(r"benchmarks/results/(base_\S+\.md)", CARD)
    page = (ROOT / "benchmarks" / "results" / name).read_text()
    assert load_picker("base").fingerprint[:16] in page
    quoted = re.findall(r"F1 ([\d., ]+) \|", CARD.split("## How well")[1])
    figures = [number for row in quoted for number in row.split(", ")]
    assert len(figures) == 6
    assert all(f"| {number} |" in page for number in figures)
