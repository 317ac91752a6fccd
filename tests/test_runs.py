from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.picker import load_picker
from tomocpt_stream.runs import BEST, STATE, Run, alone_in, claim
from tomocpt_stream.train_options import Pace, TrainOptions
from tomocpt_stream.whole import write_whole

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = TrainOptions(schedule="plateau", stop_after=3)


def _run(folder: Path, options: TrainOptions = OPTIONS, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    network, averaged = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimiser = torch.optim.AdamW(network.parameters())
    return Run(options, network, averaged, optimiser, folder, {"provenance": {}}, {})


def test_a_run_goes_on_with_all_that_it_had(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.resume()
    assert run.step == 0
    for _ in range(3):
        run.optimiser.zero_grad()
        run.network(torch.ones(1, 2)).sum().backward()
        run.optimiser.step()
    run.step = 7
    for value in (0.5, 0.6, 0.7):
        run.pace.look(value, OPTIONS)
    run.pace.factor = 0.25
    run.keep_state()

    again = _run(tmp_path, seed=1)
    assert not torch.equal(again.network.weight, run.network.weight)  # type: ignore[arg-type]
    again.resume()
    assert again.step == 7
    assert again.pace == Pace(best=0.5, since_best=2, since_halved=2, factor=0.25)
    for one, other in ((run.network, again.network), (run.averaged, again.averaged)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    kept, found = run.optimiser.state_dict()["state"], again.optimiser.state_dict()["state"]
    assert torch.equal(kept[0]["exp_avg"], found[0]["exp_avg"])
    # The third look without a lower loss ends it, as it would have without a kill.
    again.pace.look(0.6, OPTIONS)
    assert again.pace.over(OPTIONS)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    _run(tmp_path).keep_state()
    with pytest.raises(CheckpointError, match="other options"):
        _run(tmp_path, replace(OPTIONS, patience=7)).resume()
    (tmp_path / STATE).write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        _run(tmp_path).resume()
    torch.save([1, 2], tmp_path / STATE)
    with pytest.raises(CheckpointError, match="other options"):
        _run(tmp_path).resume()


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    claim(tmp_path / "a", {"epochs": 2, "examples": ["x"]})
    claim(tmp_path / "a", {"epochs": 2, "examples": ["x"]})
    with pytest.raises(CheckpointError, match=r"differs in epochs 2 \(now 3\)"):
        claim(tmp_path / "a", {"epochs": 3, "examples": ["x"]})
    options = {"seed": 0, "sampling": {"radius": 10.0, "label": "binary"}}
    claim(tmp_path / "b", {"epochs": 2, "options": options})
    other = options | {"batch_size": 4, "sampling": {"radius": 8.0, "label": "binary"}}
    with pytest.raises(
        CheckpointError, match=r"differs in radius 10.0 \(now 8.0\), batch_size none \(now 4\);"
    ):
        claim(tmp_path / "b", {"epochs": 2, "options": other})
    claim(tmp_path / "c", {"examples": ["x", "y", "z"]})
    with pytest.raises(CheckpointError, match=r"differs in examples \(2 of 3\);"):
        claim(tmp_path / "c", {"examples": ["x", "w", "z"]})
    with pytest.raises(CheckpointError, match=r"differs in examples of 3 \(now of 1\);"):
        claim(tmp_path / "c", {"examples": ["x"]})
    for text in ("{", "[]"):
        (tmp_path / "a" / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match="choose another folder"):
            claim(tmp_path / "a", {"epochs": 2, "examples": ["x"]})


def test_what_a_run_goes_on_from_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, picker = _run(tmp_path), load_picker("base")
    named: list[list[str]] = []

    def settled(_: int) -> None:
        named.append(sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".partial"))

    monkeypatch.setattr(os, "fsync", settled)
    picker.save(tmp_path / BEST)
    run.keep_state()
    write_whole(tmp_path / "run.json", "{}")
    # One at a time, each while it has a temporary name.
    assert named == [[], [BEST], [BEST, STATE]]


def test_a_run_that_has_learnt_nothing_makes_way(tmp_path: Path) -> None:
    """What was prepared in a folder is not lost to a mistake that the first attempt showed."""
    begun = tmp_path / "run" / STATE
    for epochs in (2, 3):
        claim(tmp_path, {"epochs": epochs}, begun=begun)
    begun.parent.mkdir()
    begun.touch()
    claim(tmp_path, {"epochs": 3}, begun=begun)
    with pytest.raises(CheckpointError, match="differs in epochs"):
        claim(tmp_path, {"epochs": 2}, begun=begun)


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with alone_in(folder):
        with pytest.raises(CheckpointError, match="another process trains in"), alone_in(folder):
            pass
        # What the other one is writing stays.
        (folder / ".state.pt.1-a.partial").touch()
    (folder / "state.pt").touch()
    with alone_in(folder):
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "state.pt"]


def test_a_folder_without_locks_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".state.pt.1-a.partial").touch()
    with alone_in(tmp_path), alone_in(tmp_path):
        assert (tmp_path / ".state.pt.1-a.partial").exists()
