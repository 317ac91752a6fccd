"""What a training run leaves in its folder, and how it goes on from there."""

from __future__ import annotations

import fcntl
import hashlib
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.network import build_network
from tomocpt_stream.picker import Picker
from tomocpt_stream.train_options import Pace
from tomocpt_stream.whole import PARTIAL, settle, whole, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from tomocpt_stream.train_options import TrainOptions

STATE_VERSION = 2

BEST, LAST, STATE = "best.safetensors", "last.safetensors", "state.pt"


@dataclass(eq=False)
class Run:
    """A run as it stands: weights, their average, optimiser, pace; its folder keeps all of them.

    `metadata` is that of its pickers, but for the label and for step and validation loss in their provenance.
    """

    options: TrainOptions
    network: nn.Module
    averaged: nn.Module
    optimiser: torch.optim.Optimizer
    folder: Path
    metadata: Mapping[str, Any]
    label: Mapping[str, Any]
    """What the run teaches; its pickers name it once they have learnt."""
    pace: Pace = field(default_factory=Pace)
    step: int = 0
    """Steps done."""

    def resume(self) -> None:
        """Take up the state of the folder, if there is one; CheckpointError where it is of another run."""
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            # weights_only: tensors and plain data, no code.
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises whatever the unpickler of the day raises
            raise self._other(f"a state that cannot be read ({error})") from error
        if not isinstance(state, dict) or state.get("run") != self._name():
            raise self._other("the state of a run with other options")
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.pace, self.step = Pace(**state["pace"]), state["step"]

    def keep_pickers(self, validation: float | None, *, best: bool) -> None:
        """Write the pickers, each whole or not at all; `best`: this is the best one.

        They come before the state: a run that is killed in between goes on to make them again.
        """
        picker = self._picker(validation)
        if best:
            picker.save(self.folder / BEST)
        picker.save(self.folder / LAST)

    def keep_state(self) -> None:
        """Write the state, from which a run that was killed goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "run": self._name(),
            "step": self.step,
            "pace": asdict(self.pace),
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with whole(self.folder / STATE) as temporary:
            torch.save(state, temporary)
            settle(temporary)

    def _picker(self, validation: float | None) -> Picker:
        copy = build_network(self.options.architecture)
        copy.load_state_dict(self.averaged.state_dict())
        provenance = self.metadata["provenance"] | {"step": self.step, "validation_loss": validation}
        # What has learnt nothing here is still the picker that the run began with, fingerprint and all.
        taught = {"label": dict(self.label)} if self.step else {}
        return Picker(copy, {**self.metadata, **taught, "provenance": provenance})

    def _name(self) -> str:
        text = json.dumps({"version": STATE_VERSION, "options": self.options.to_json()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _other(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} holds {found}",
            expected="no state, or one of a run with these options",
            remedy="choose another folder, or remove this one to start again",
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes, and clear it of what killed ones left half written.

    Raises CheckpointError while another process holds it. A process that dies holds nothing. Where the file
    system has no locks, nothing is held and nothing cleared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process trains in {folder}",
                expected="one process at a time",
                remedy="wait for it, stop it, or choose another folder",
            ) from error
        except OSError:
            yield
            return
        for left in folder.glob(PARTIAL):
            left.unlink(missing_ok=True)
        yield


def claim(folder: Path, record: Mapping[str, Any], *, begun: Path | None = None) -> None:
    """Write down what the run in `folder` is, or raise CheckpointError where it is that of another run.

    Where the file `begun` is given and not there yet, nothing was learnt: the new account takes the place of
    the old one, so that what was prepared in the folder is not lost to a corrected mistake.
    """
    path = folder / "run.json"
    wanted = json.loads(json.dumps(dict(record)))
    if not path.exists() or (begun is not None and not begun.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(wanted, indent=1))
        return
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = {}
    there = there if isinstance(there, dict) else {}
    if there != wanted:
        phrases = list(_differing(there, wanted))
        if any(phrase.startswith("epochs ") for phrase in phrases):  # of which the steps are made
            phrases = [phrase for phrase in phrases if not phrase.startswith("steps ")]
        raise CheckpointError(
            f"{folder} holds a run that differs in {', '.join(phrases)}",
            expected="an empty folder, or one of a run on the same examples with the same options",
            remedy="choose another folder",
        )


def _differing(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between two accounts, the options one by one."""
    for key in (*wanted, *(key for key in there if key not in wanted)):
        one, other = there.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differing(one, other)
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            places = [str(place) for place, (a, b) in enumerate(zip(one, other, strict=True), 1) if a != b]
            if places:
                yield f"{key} ({' '.join(places)} of {len(one)})"
        elif one != other:
            yield f"{key} {_short(one)} (now {_short(other)})"


def _short(value: Any) -> str:
    """Return a value for a message: lists by their lengths, texts by their beginnings."""
    if isinstance(value, (list, dict)):
        return f"of {len(value)}"
    return "none" if value is None else str(value)[:16]
