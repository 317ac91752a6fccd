"""What decides a training run, as plain data, and how fast it learns at each of its steps."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tomocpt_stream.crops import Sampling
from tomocpt_stream.errors import PlanError
from tomocpt_stream.network import named_architecture
from tomocpt_stream.targets import WIDTHS

Precision = Literal["float32", "bfloat16"]
Schedule = Literal["plateau", "cosine", "constant"]

_PRECISIONS = ("float32", "bfloat16")
_SCHEDULES = ("plateau", "cosine", "constant")


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides a run, as plain data; two runs of equal options give equal pickers."""

    architecture: dict[str, Any] = field(default_factory=lambda: named_architecture("small"))
    """What `build_network` builds."""
    steps: int = 1000
    """Optimiser steps in all, those of earlier parts of the run included."""
    batch_size: int = 2
    """Crops a step, on all devices together."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW; the paper's is 4e-4 at batches of ten."""
    warm_up: int = 50
    """Steps over which the learning rate rises from 0."""
    schedule: Schedule = "cosine"
    """"cosine": down to a hundredth of the highest rate at the last step; "plateau": see `patience`."""
    patience: int = 6
    """Of "plateau": looks in a row without a lower validation loss after which the rate is halved."""
    stop_after: int = 0
    """Looks in a row without a lower validation loss after which the run ends; 0 never ends it early."""
    weight_decay: float = 1e-10
    """Of AdamW; the paper's."""
    gradient_weight: float = 10.0
    """Weight of the gradient term (equation 6)."""
    clip_norm: float = 1.0
    """Largest norm of all gradients of a step."""
    average: float = 0.0
    """Decay per step of the running average of the weights; 0 keeps the last weights."""
    precision: Precision = "float32"
    """Type of the multiplications of the network; weights, loss and optimiser stay float32."""
    seed: int = 0
    """Of weights, crops and drop-out."""
    sampling: Sampling = field(default_factory=Sampling)
    """How crops are drawn and changed."""
    checkpoint_every: int = 100
    """Steps between checkpoints, and between looks at the validation crops."""
    validation_crops: int = 32
    """Crops, always the same ones, that the validation loss is the mean of."""

    def __post_init__(self) -> None:
        """Refuse numbers that no run can have."""
        positive = (
            "steps",
            "batch_size",
            "learning_rate",
            "clip_norm",
            "checkpoint_every",
            "validation_crops",
            "patience",
        )
        for name in positive:
            self._require(name, "a finite number above 0", 0 < getattr(self, name) < math.inf)
        for name in ("warm_up", "stop_after", "weight_decay", "gradient_weight", "seed"):
            self._require(name, "a finite number, 0 or above", 0 <= getattr(self, name) < math.inf)
        # Seeds of steps are made of it, in 64 bits.
        self._require("seed", "a number below 2**32", self.seed < 2**32)
        self._require("average", "a decay from 0 up to below 1", 0 <= self.average < 1)
        self._require("precision", " or ".join(_PRECISIONS), self.precision in _PRECISIONS)
        self._require("schedule", " or ".join(_SCHEDULES), self.schedule in _SCHEDULES)

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain data."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.sampling.widths == WIDTHS:  # left out, so that earlier runs stay what they were
            del plain["sampling"]["widths"]
        return plain

    def _require(self, name: str, expected: str, holds: bool) -> None:  # noqa: FBT001
        if not holds:
            raise PlanError(f"{name} {getattr(self, name)}", expected=expected, remedy=f"change {name}")


@dataclass
class Pace:
    """What the looks at the validation crops say about going on; part of what a run keeps.

    The paper halves the rate when the validation loss has not fallen for 6 epochs and ends after 36
    (section 2). One look an epoch is what `train` has.
    """

    best: float = math.inf
    """Lowest validation loss so far."""
    since_best: int = 0
    """Looks since then."""
    since_halved: int = 0
    """Of these, the looks since the rate was halved last."""
    factor: float = 1.0
    """Product of all halvings."""

    def look(self, validation: float, options: TrainOptions) -> bool:
        """Take note of a validation loss; return whether it is the lowest so far."""
        if validation < self.best:
            self.best, self.since_best, self.since_halved = validation, 0, 0
            return True
        self.since_best += 1
        self.since_halved += 1
        if options.schedule == "plateau" and self.since_halved >= options.patience:
            self.factor, self.since_halved = self.factor / 2, 0
        return False

    def over(self, options: TrainOptions) -> bool:
        """Return whether the run ends here, before its last step."""
        return 0 < options.stop_after <= self.since_best

    def learning_rate(self, options: TrainOptions, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        highest = options.learning_rate * self.factor
        if step < options.warm_up:
            return highest * (step + 1) / options.warm_up
        if options.schedule != "cosine":
            return highest
        share = (step - options.warm_up) / max(1, options.steps - options.warm_up)
        return highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
