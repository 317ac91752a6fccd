"""The paper's experiments, from `experiments.toml`: run one after the other, or only checked.

    python benchmarks/paper_portal/paper_portal.py --dry-run
    python benchmarks/paper_portal/paper_portal.py base --folder runs
    python benchmarks/paper_portal/paper_portal.py rubisco --folder runs --file truth=rubisco.star \
        --file base=runs/base/gaussian.out/base.safetensors --file "tomograms=CB_*.mrc"

Steps that were done are not done again; what a killed step had done, its command goes on from. The dry run
asks nobody: it parses each command with the program's own options, each query of the portal, and each
hand-over, and sees that a step finds what the steps before it make.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import tomllib
from contextlib import chdir
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import click
import numpy as np

from tomocpt_stream.__main__ import main as program
from tomocpt_stream.formats import FORMATS
from tomocpt_stream.formats.handover import next_command
from tomocpt_stream.label_queries import LabelQuery, read_query
from tomocpt_stream.picks import Picks

EXPERIMENTS = Path(__file__).with_name("experiments.toml")


@dataclass(frozen=True)
class Step:
    """One command, whose words hold {names} of facts and files, and what it makes below the folder."""

    command: str
    makes: tuple[str, ...] = ()

    def words(self, values: dict[str, str | list[str]]) -> list[str]:
        """Return the command's words; one that is a name alone may become several."""
        plain = {name: value if isinstance(value, str) else ",".join(value) for name, value in values.items()}
        found: list[str] = []
        for word in shlex.split(self.command):
            value = values.get(word[1:-1]) if word.startswith("{") and word.endswith("}") else None
            found += value if isinstance(value, list) else [word.format_map(plain)]
        return found


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper: its facts, each with its source, the files it needs, and its steps."""

    name: str
    what: str
    source: str
    facts: dict[str, dict[str, Any]]
    steps: tuple[Step, ...]
    files: dict[str, str] = field(default_factory=dict)
    handovers: tuple[dict[str, Any], ...] = ()

    def values(self) -> dict[str, str | list[str]]:
        """Return the facts as text."""
        return {
            name: list(map(str, fact["value"])) if isinstance(fact["value"], list) else str(fact["value"])
            for name, fact in self.facts.items()
        }


def read_experiments(path: Path = EXPERIMENTS) -> list[Experiment]:
    """Return the experiments of a file; facts of all of them are in each, below its own."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    found = []
    for one in data["experiment"]:
        facts = data["facts"] | one["facts"]
        for name, fact in facts.items():
            if not fact.get("source") or "value" not in fact:
                raise ValueError(f"{one['name']}: the fact {name} has no value or no source")
        steps = tuple(Step(step["command"], tuple(step.get("makes", ()))) for step in one["step"])
        files = one.get("files", {})
        handovers = tuple(one.get("handover", ()))
        found.append(Experiment(one["name"], one["what"], one["source"], facts, steps, files, handovers))
    return found


def check(experiment: Experiment) -> list[str]:
    """Parse the commands of an experiment in an empty folder; return them, and the queries they ask."""
    said = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        values = experiment.values() | {"folder": "results"}
        for name in experiment.files:
            Path(name).touch()
            values[name] = name
        for step in experiment.steps:
            words = step.words(values)
            parameters = parse(words)
            said.append(shlex.join(["tomocpt-stream", *words]))
            queries = [read_query(text, truth=parameters["truth"]) for text in parameters.get("portal", ())]
            said += [f"  learns from {query}: {_truth(query)}" for query in queries]
            for made in step.makes:
                path = Path("results", made)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return said + [line for handover in experiment.handovers for line in hand_over(experiment, handover)]


def parse(words: list[str]) -> dict[str, Any]:
    """Return the parameters of a command as the program reads them; click's error where it cannot."""
    name, *rest = words
    command = program.commands[name]
    if isinstance(command, click.Group):
        name, *rest = rest
        command = command.commands[name]
    return command.make_context(name, rest).params


def hand_over(experiment: Experiment, handover: dict[str, Any]) -> list[str]:
    """Return the command of the next program with the paper's numbers, and what follows it."""
    if not FORMATS[handover["format"]].writes:
        raise ValueError(f"{experiment.name}: no picks are written as {handover['format']}")
    facts = experiment.facts
    diameter = float((facts.get("diameter") or facts["spike_diameter"])["value"])
    picks = Picks(
        np.zeros((0, 3)), np.zeros(0, np.float32), voxel_size=handover.get("coords_angpix"), tomogram="TS_1"
    )
    line = next_command(handover["format"], f"{experiment.name}.star", [picks], diameter=diameter)
    words = line.splitlines()[0].split(" ")
    for option in ("output_angpix", "box"):
        if option in handover:
            words[words.index(f"--{option}") + 1] = str(handover[option])
    return [" ".join(words), *(f"  then {what}" for what in handover["then"])]


def run(experiment: Experiment, folder: Path, files: dict[str, str]) -> None:
    """Do the steps of an experiment that were not done; CalledProcessError where one fails."""
    if lacking := [
        f"--file {name}=...: {what}" for name, what in experiment.files.items() if name not in files
    ]:
        raise SystemExit("\n".join([f"{experiment.name} needs files:", *lacking]))
    own = folder / experiment.name
    values = experiment.values() | {"folder": str(own)}
    for name in experiment.files:
        values[name] = sorted(glob(files[name])) or files[name]  # noqa: PTH207  (a path may be absolute)
    own.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(experiment.steps, 1):
        words, done = step.words(values), own / f"step_{number:02}.json"
        print(shlex.join(["tomocpt-stream", *words]), flush=True)
        if done.exists() and json.loads(done.read_text()) == words:
            continue
        subprocess.run([sys.executable, "-m", "tomocpt_stream", *words], check=True)
        done.write_text(json.dumps(words))
    for handover in experiment.handovers:
        print("\n".join(hand_over(experiment, handover)))


def _truth(query: LabelQuery) -> str:
    return f"files {', '.join(query.truth)}" if query.truth else f"annotations of {query.object}"


def main(arguments: list[str] | None = None) -> None:
    """Check or run the experiments that are named, all where none is."""
    experiments = {one.name: one for one in read_experiments()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", choices=[*experiments, []], metavar="EXPERIMENT")
    parser.add_argument("--dry-run", action="store_true", help="parse every command; ask nobody")
    parser.add_argument("--folder", type=Path, default=Path("paper_portal"), help="takes the results")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH", help="a file it needs")
    options = parser.parse_args(arguments)
    files = dict(text.split("=", 1) for text in options.file)
    for name in options.names or experiments:
        one = experiments[name]
        print(f"# {name}: {one.what} ({one.source})")
        if options.dry_run:
            print("\n".join(check(one)))
        else:
            run(one, options.folder, files)


if __name__ == "__main__":
    main()
