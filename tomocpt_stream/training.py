"""Training: one loop to read from top to bottom, for a start from nothing, a resumed and a continued run.

The loss is that of the paper (section 2.3, equations 6 to 9), the labels those of section 2.1. A step's
crops and its drop-out follow from the seed and the step, so that a run that was killed goes on from its
last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from tomocpt_stream.crops import Example, Sampling, check_examples, draw_batch
from tomocpt_stream.epochs import Epochs
from tomocpt_stream.errors import CheckpointError, PlanError
from tomocpt_stream.losses import loss_terms
from tomocpt_stream.network import build_network, named_architecture, place, start_quiet
from tomocpt_stream.picker import Picker, load_picker, picker_metadata
from tomocpt_stream.targets import WIDTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from tomocpt_stream.crops import Batch

Precision = Literal["float32", "bfloat16"]

STATE_VERSION = 1


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides a run, as plain data; two runs of equal options give equal pickers."""

    architecture: dict[str, Any] = field(default_factory=lambda: named_architecture("small"))
    """What `build_network` builds."""
    steps: int = 1000
    """Optimiser steps in all, those of earlier parts of the run included."""
    batch_size: int = 2
    """Crops a step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW; the paper's is 4e-4 at batches of ten."""
    warm_up: int = 50
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """"cosine": down to a hundredth of the highest rate at the last step."""
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
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise PlanError(
                    f"{name} {getattr(self, name)}", expected="a number above 0", remedy=f"raise {name}"
                )
        if not 0 <= self.average < 1:
            raise PlanError(
                f"average {self.average}", expected="a decay from 0 up to below 1", remedy="pass 0 for none"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain data."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


@dataclass(frozen=True)
class Step:
    """What a listener is told after a step; `validation` is None between checkpoints."""

    step: int
    steps: int
    loss: float
    weighted: float
    gradient: float
    norm: float
    learning_rate: float
    seconds: float
    validation: float | None


def ignore(step: Step) -> None:
    """Take no note of a step."""


def train(
    examples: Sequence[Example] | Epochs,
    *,
    options: TrainOptions,
    folder: Path,
    validation: Sequence[Example] | Epochs = (),
    start: Picker | None = None,
    provenance: dict[str, Any] | None = None,
    on_step: Callable[[Step], None] = ignore,
) -> Picker:
    """Return a picker trained on `examples`; the best by validation loss, or the last without validation.

    Examples are drawn from at random by `options.sampling`; `Epochs` give each of their crops in turn.

    `folder` takes `state.pt`, `last.safetensors` and `best.safetensors` at every checkpoint; where it
    holds the state of a run with the same options, that run goes on. `start` gives the first weights
    (fine-tuning) and says how protein looks; its architecture must be that of the options. `provenance`
    is kept in the picker.

    Raises CheckpointError where the folder holds another run, SourceError where there is no particle.
    """
    if not isinstance(examples, Epochs):
        check_examples(examples, "training")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, averaged = _networks(options, start, device)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    record = {"options": options.to_json()} | (provenance or {})
    contrast = "dark" if start is None else start.contrast
    run = _Run(options, network, averaged, optimiser, folder, record, contrast)
    first = run.resume()
    held = list(_held_crops(validation, options)) if validation else []

    with ThreadPoolExecutor(1) as loader:
        drawn = loader.submit(_crops, examples, options, first)
        for step in range(first, options.steps):
            began = time.perf_counter()
            crops = drawn.result().to(device)
            drawn = loader.submit(_crops, examples, options, step + 1)  # while the network works

            # Drop-out follows from seed and step, as the crops do.
            torch.manual_seed(options.seed * 1_000_003 + step)
            rate = learning_rate(options, step)
            for group in optimiser.param_groups:
                group["lr"] = rate
            network.train()
            weighted, gradient = loss_terms(answer(network, crops.voxels, options), crops.label, crops.known)
            loss = weighted + options.gradient_weight * gradient
            if not bool(torch.isfinite(loss)):
                raise CheckpointError(
                    f"a loss of {float(loss.detach())} at step {step}",
                    expected="a finite loss",
                    remedy="lower the learning rate, or train in float32, and start again in a new folder",
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip_norm)
            optimiser.step()
            _average(averaged, network, options, step)

            value = None
            if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                value = _validate(averaged, held, options) if held else None
                run.keep(step + 1, value)
            on_step(
                Step(
                    step + 1,
                    options.steps,
                    float(loss.detach()),
                    float(weighted.detach()),
                    float(gradient.detach()),
                    float(norm),
                    rate,
                    time.perf_counter() - began,
                    value,
                )
            )
    best = folder / "best.safetensors"
    return load_picker(best if best.exists() else folder / "last.safetensors")


def answer(network: nn.Module, voxels: torch.Tensor, options: TrainOptions) -> torch.Tensor:
    """Return the network's answer (n, z, y, x), after the sigmoid, in float32."""
    channels = voxels.unsqueeze(1).contiguous(memory_format=torch.channels_last_3d)
    half = options.precision == "bfloat16"
    with torch.autocast(voxels.device.type, torch.bfloat16, enabled=half):
        logits = network(channels)
    return torch.sigmoid(logits.float()).squeeze(1)


def learning_rate(options: TrainOptions, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < options.warm_up:
        return options.learning_rate * (step + 1) / options.warm_up
    if options.schedule == "constant":
        return options.learning_rate
    share = (step - options.warm_up) / max(1, options.steps - options.warm_up)
    return options.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def _networks(
    options: TrainOptions, start: Picker | None, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """Return the network that learns and the one that keeps the average of its weights."""
    torch.manual_seed(options.seed)
    network, averaged = build_network(options.architecture), build_network(options.architecture)
    if start is None:
        start_quiet(network)
    else:
        start.copy_weights(network)
    averaged.load_state_dict(network.state_dict())
    return place(network, device), place(averaged, device)


class _Tensors(NamedTuple):
    """A `Batch` as tensors."""

    voxels: torch.Tensor
    label: torch.Tensor
    known: torch.Tensor | None

    def to(self, device: torch.device) -> _Tensors:
        known = None if self.known is None else self.known.to(device)
        return _Tensors(self.voxels.to(device), self.label.to(device), known)


def _tensors(batch: Batch) -> _Tensors:
    known = None if batch.known is None else torch.from_numpy(batch.known)
    return _Tensors(torch.from_numpy(batch.voxels), torch.from_numpy(batch.label), known)


def _crops(examples: Sequence[Example] | Epochs, options: TrainOptions, step: int) -> _Tensors:
    if isinstance(examples, Epochs):
        return _tensors(examples.batch(options.batch_size, step))
    size, seed = options.batch_size, options.seed
    return _tensors(draw_batch(examples, options.sampling, size=size, seed=seed, step=step))


def _held_crops(validation: Sequence[Example] | Epochs, options: TrainOptions) -> Iterator[_Tensors]:
    """Yield the crops that the validation loss is measured on; never those of a training step."""
    if isinstance(validation, Epochs):
        for index in range(min(len(validation), options.validation_crops)):
            yield _tensors(validation.batch(1, index))
        return
    check_examples(validation, "validation")
    plain = Sampling(options.sampling.window, options.sampling.radius, options.sampling.label)
    for index in range(options.validation_crops):
        yield _tensors(draw_batch(validation, plain, size=1, seed=2**31 + options.seed, step=index))


@torch.inference_mode()
def _validate(network: nn.Module, held: list[_Tensors], options: TrainOptions) -> float:
    network.eval()
    device = next(network.parameters()).device
    losses = []
    for crops in (one.to(device) for one in held):
        answered = answer(network, crops.voxels, options)
        weighted, gradient = loss_terms(answered, crops.label, crops.known)
        losses.append(float(weighted + options.gradient_weight * gradient))
    return float(np.mean(losses))


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, options: TrainOptions, step: int) -> None:
    """Move the averaged weights towards the learning ones; early steps forget faster."""
    decay = min(options.average, (step + 1) / (step + 10))
    for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


@dataclass(eq=False)
class _Run:
    """What a run leaves on disk, and how it goes on from there."""

    options: TrainOptions
    network: nn.Module
    averaged: nn.Module
    optimiser: torch.optim.Optimizer
    folder: Path
    record: dict[str, Any]
    contrast: str
    best: float = math.inf

    def resume(self) -> int:
        """Return the step to begin with, after taking up the state of the folder, if any."""
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
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
        self.best = state["best"]
        step: int = state["step"]
        return step

    def keep(self, step: int, validation: float | None) -> None:
        """Write the pickers, then the state, each whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        picker = self._picker(step, validation)
        if validation is not None and validation < self.best:
            self.best = validation
            picker.save(self.folder / "best.safetensors")
        picker.save(self.folder / "last.safetensors")
        temporary = self.folder / "state.pt.part"
        state = {
            "run": self._name(),
            "step": step,
            "best": self.best,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        torch.save(state, temporary)
        temporary.replace(self.folder / "state.pt")

    def _picker(self, step: int, validation: float | None) -> Picker:
        copy = build_network(self.options.architecture)
        copy.load_state_dict(self.averaged.state_dict())
        sampling = self.options.sampling
        metadata = picker_metadata(
            self.options.architecture,
            window=sampling.window,
            particle_radius=sampling.radius,
            label={"kind": sampling.label, "widths": list(WIDTHS)},
            contrast=self.contrast,
            provenance=self.record | {"step": step, "validation_loss": validation},
        )
        return Picker(copy, metadata)

    def _name(self) -> str:
        text = json.dumps({"version": STATE_VERSION, "options": self.options.to_json()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _other(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} holds {found}",
            expected="no state, or one of a run with these options",
            remedy="choose another folder, or remove this one to start again",
        )
