"""The training loop: the same for a start from nothing, from a picker, and from where a run was killed.

The loss is that of the paper (section 2.3, equations 6 to 9), the labels those of section 2.1. A step's
crops and its drop-out follow from the seed and the step, so that a run that was killed goes on from its
last checkpoint as if nothing had happened; on a GPU up to the last bits, which its sums leave open.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tomocpt_stream.crops import Example, check_examples
from tomocpt_stream.epochs import Epochs
from tomocpt_stream.errors import CheckpointError
from tomocpt_stream.feed import Feed, held_crops, loader_threads, step_crops
from tomocpt_stream.losses import loss_sums, loss_terms
from tomocpt_stream.memory import freed_memory_kept
from tomocpt_stream.network import build_network, place, start_quiet
from tomocpt_stream.picker import Picker, load_picker, picker_metadata
from tomocpt_stream.ranks import check_devices, start
from tomocpt_stream.runs import BEST, LAST, Run, alone_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from tomocpt_stream.feed import Crops
    from tomocpt_stream.ranks import Ranks
    from tomocpt_stream.train_options import TrainOptions

_LOGGER = logging.getLogger(__name__)
# Between two checkpoints the state alone is written as often as this, seconds.
_STATE_EVERY = 600.0


@dataclass(frozen=True)
class Step:
    """What a listener is told after a step; `validation` is None between checkpoints.

    `epoch` counts from 1: the checkpoints begun. `seconds` is the time of the step and of the look at the
    validation crops, `waited` that part of it in which the network had no crops.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    weighted: float
    gradient: float
    norm: float
    learning_rate: float
    seconds: float
    waited: float
    validation: float | None


@dataclass(frozen=True, eq=False)
class Look:
    """A validation crop and what the network answers to it after `step` steps; arrays are (z, y, x).

    `voxels` are normalised intensities, `label` and `answered` lie from 0 to 1; where `known` is False
    the truth is not known. None: it is known everywhere.
    """

    step: int
    epoch: int
    voxels: npt.NDArray[np.float32]
    label: npt.NDArray[np.float32]
    answered: npt.NDArray[np.float32]
    known: npt.NDArray[np.bool_] | None


class Listener(Protocol):
    """Who is told of a run while it goes on; only in the process that called for it."""

    def step(self, step: Step) -> None:
        """Take note of a step."""

    def look(self, look: Look) -> None:
        """Take note of a validation crop, once at each checkpoint."""


class TimeOver(Exception):
    """What a listener raises to end a run for now; all are told of the step, and the same call goes on."""


@dataclass(frozen=True)
class OnStep:
    """A listener that tells a function of each step."""

    told: Callable[[Step], None]

    def step(self, step: Step) -> None:
        """Tell of a step."""
        self.told(step)

    def look(self, look: Look) -> None:
        """Take no note of a crop."""


@dataclass(frozen=True, eq=False)
class _Task:
    """What every rank is told; it travels to their processes."""

    examples: Sequence[Example] | Epochs
    validation: Sequence[Example] | Epochs
    options: TrainOptions
    folder: Path
    start: Picker | None
    provenance: Mapping[str, Any]


def learn(  # noqa: PLR0913  (what a run is made of, where it goes, who is told)
    examples: Sequence[Example] | Epochs,
    *,
    options: TrainOptions,
    folder: Path,
    validation: Sequence[Example] | Epochs = (),
    start_from: Picker | None = None,
    provenance: Mapping[str, Any] | None = None,
    devices: int = 1,
    listeners: Sequence[Listener] = (),
) -> Picker:
    """Return a picker trained on `examples`; the best by validation loss, or the last without validation.

    Examples are drawn from at random by `options.sampling`; `Epochs` give each of their crops in turn.

    `folder` takes `state.pt`, `last.safetensors` and `best.safetensors` at every checkpoint; where it
    holds the state of a run with the same options, that run goes on. `start_from` gives the first weights,
    whose architecture must be that of the options, and says how the network is fed; it is itself returned
    where no checkpoint has a lower validation loss. What has learnt names the label of the options as its
    own. `provenance` is kept in the picker. `devices` divide each step's crops among them.

    Raises CheckpointError where the folder holds another run or another process trains in it, SourceError
    where there is no particle, PlanError where there are not so many devices.
    """
    if not isinstance(examples, Epochs):
        check_examples(examples, "training")
    check_devices(devices)
    task = _Task(examples, validation, options, folder, start_from, dict(provenance or {}))
    with alone_in(folder), start(devices, partial(_learn, task)) as ranks:
        _learn(task, ranks, listeners)
    best = folder / BEST
    return load_picker(best if best.exists() else folder / LAST)


def answer(network: nn.Module, voxels: torch.Tensor, options: TrainOptions) -> torch.Tensor:
    """Return the network's answer (n, z, y, x), after the sigmoid, in float32."""
    channels = voxels.unsqueeze(1).contiguous(memory_format=torch.channels_last_3d)
    half = options.precision == "bfloat16"
    with torch.autocast(voxels.device.type, torch.bfloat16, enabled=half):
        logits = network(channels)
    return torch.sigmoid(logits.float()).squeeze(1)


def _learn(task: _Task, ranks: Ranks, listeners: Sequence[Listener] = ()) -> None:
    """Do one rank's part of a run, from where it stands to its end; rank 0 writes and tells."""
    options, run = task.options, _run(task, ranks.device)
    run.resume()
    ranks.wait()  # nobody writes before all have read
    threads = loader_threads(ranks.device, ranks=ranks.count)
    held = _Held(task, ranks, threads)
    if run.step == 0 and task.start is not None and math.isinf(run.pace.best):
        value = _look(run, held, ranks)
        if ranks.rank == 0 and value is not None:
            _LOGGER.info("the picker as it is: validation loss %.5f", value)
        with _kept(run, ranks, due=True):
            _show(run, held, ranks, listeners)

    draw = partial(step_crops, task.examples, options, rank=ranks.rank, ranks=ranks.count)
    joined = ranks.join(run.network)
    began, waited, kept = time.perf_counter(), 0.0, time.monotonic()
    todo, first = range(run.step, options.steps), run.step
    pin = ranks.device.type == "cuda"
    with freed_memory_kept(), Feed(draw, todo, threads=threads, pin=pin) as feed:
        while run.step < options.steps and not run.pace.over(options):
            at = time.perf_counter()
            crops = _next(feed, ranks)
            numbers = _step(run, joined, crops, ranks)
            waited += feed.waited

            value = None
            epoch = 1 + (run.step - 1) // options.checkpoint_every
            checkpoint = run.step % options.checkpoint_every == 0 or run.step == options.steps
            if checkpoint:
                value = _look(run, held, ranks)
            due = checkpoint or time.monotonic() - kept > _STATE_EVERY
            seconds = time.perf_counter() - at
            told = Step(run.step, options.steps, epoch, *numbers, seconds, feed.waited, validation=value)
            with _kept(run, ranks, due=due):
                look = partial(_show, run, held, ranks, listeners) if checkpoint else None
                _announce(told, listeners, look)
            kept = time.monotonic() if due else kept
    ranks.wait()  # what rank 0 has written is there
    if ranks.rank == 0:
        _tell(run, first, time.perf_counter() - began, waited)


def _run(task: _Task, device: torch.device) -> Run:
    """Return the run at its beginning: the network that learns and the average of its weights."""
    options, start_from = task.options, task.start
    torch.manual_seed(options.seed)
    network, averaged = build_network(options.architecture), build_network(options.architecture)
    label = {"kind": options.sampling.label, "widths": list(options.sampling.widths)}
    if start_from is None:
        start_quiet(network)
        metadata = picker_metadata(
            options.architecture,
            window=options.sampling.window,
            particle_radius=options.sampling.radius,
            label=label,
        )
    else:
        start_from.copy_weights(network)
        metadata = start_from.metadata
    averaged.load_state_dict(network.state_dict())
    network, averaged = place(network, device), place(averaged, device)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    provenance = {"options": options.to_json(), **task.provenance}
    metadata = metadata | {"provenance": provenance}
    return Run(options, network, averaged, optimiser, task.folder, metadata, label)


def _next(feed: Feed, ranks: Ranks) -> Crops:
    """Return the next crops on the device; where one rank cannot read its own, no rank waits for it."""
    crops, failure = None, None
    try:
        crops = next(feed)
    except Exception as error:
        failure = error
    failed = ranks.sum(torch.tensor([float(crops is None)], device=ranks.device))
    if failure is not None:
        raise failure
    if crops is None or bool(failed):
        raise RuntimeError("another device could not read its crops")
    return crops.to(ranks.device)


def _step(
    run: Run, joined: nn.Module, crops: Crops, ranks: Ranks
) -> tuple[float, float, float, float, float]:
    """Take one step; return loss, its two terms, the gradients' norm and the learning rate."""
    options = run.options
    # Drop-out follows from seed and step, as the crops do.
    torch.manual_seed(options.seed * 1_000_003 + run.step + (ranks.rank << 40))
    rate = run.pace.learning_rate(options, run.step)
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    run.network.train()
    sums = loss_sums(answer(joined, crops.voxels, options), crops.label, crops.known)
    counts = ranks.sum(torch.stack([sums.voxels, sums.places]).double()).clamp(min=1)
    weighted, gradient = sums.weighted / counts[0].float(), sums.gradient / counts[1].float()
    terms = ranks.sum(torch.stack([weighted, gradient]).detach()).tolist()
    loss = terms[0] + options.gradient_weight * terms[1]
    _refuse_infinite("loss", loss, run.step)
    run.optimiser.zero_grad(set_to_none=True)
    # The ranks' gradients are averaged, their losses are parts of a sum.
    ranks.backward(ranks.count * (weighted + options.gradient_weight * gradient))
    norm = float(torch.nn.utils.clip_grad_norm_(run.network.parameters(), options.clip_norm))
    _refuse_infinite("norm of the gradients", norm, run.step)
    run.optimiser.step()
    _average(run)
    run.step += 1
    return loss, terms[0], terms[1], norm, rate


def _refuse_infinite(what: str, value: float, step: int) -> None:
    """Refuse a number that would make every weight no number."""
    if not math.isfinite(value):
        raise CheckpointError(
            f"a {what} of {value} at step {step}",
            expected=f"a finite {what}",
            remedy="lower the learning rate, or train in float32, and start again in a new folder",
        )


@torch.no_grad()
def _average(run: Run) -> None:
    """Move the averaged weights towards the learning ones; early steps forget faster."""
    decay = min(run.options.average, (run.step + 1) / (run.step + 10))
    for mean, value in zip(run.averaged.parameters(), run.network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


class _Held:
    """The share of the validation crops that is this rank's, and how many there are on all ranks."""

    def __init__(self, task: _Task, ranks: Ranks, threads: int) -> None:
        self.options = task.options
        draw, self.count = held_crops(task.validation, task.options)
        with Feed(draw, range(ranks.rank, self.count, ranks.count), threads=threads) as feed:
            self.crops = list(feed)

    @torch.inference_mode()
    def loss(self, network: nn.Module, ranks: Ranks) -> float:
        """Return the mean loss of the crops of all ranks."""
        network.eval()
        total = torch.zeros(1, dtype=torch.float64, device=ranks.device)
        for crops in (one.to(ranks.device) for one in self.crops):
            answered = answer(network, crops.voxels, self.options)
            weighted, gradient = loss_terms(answered, crops.label, crops.known)
            total += weighted + self.options.gradient_weight * gradient
        return float(ranks.sum(total)) / self.count

    @torch.inference_mode()
    def look(self, run: Run, epoch: int, device: torch.device) -> Look:
        """Return the first crop with a particle, or the first of all, with the answer to it."""
        crops = next((one for one in self.crops if float(one.label.max()) > 0.5), self.crops[0])
        answered = answer(run.averaged.eval(), crops.voxels.to(device), self.options)
        known = None if crops.known is None else crops.known[0].numpy()
        return Look(
            run.step, epoch, crops.voxels[0].numpy(), crops.label[0].numpy(), answered[0].cpu().numpy(), known
        )


def _look(run: Run, held: _Held, ranks: Ranks) -> float | None:
    """Look at the validation crops and write the pickers; return the validation loss."""
    value = held.loss(run.averaged, ranks) if held.count else None
    best = value is not None and run.pace.look(value, run.options)
    if ranks.rank == 0:
        run.keep_pickers(value, best=best)
    return value


@contextmanager
def _kept(run: Run, ranks: Ranks, *, due: bool) -> Iterator[None]:
    """Write the state at the end, where it is due, and even where a listener raises.

    A run that is killed in between does the step again, and so tells of it: no listener misses one. Of a
    step that TimeOver ends, all have heard.
    """
    try:
        yield
    except TimeOver:
        due = True
        raise
    finally:
        if due and ranks.rank == 0:
            run.keep_state()


def _announce(told: Step, listeners: Sequence[Listener], look: Callable[[], None] | None) -> None:
    """Tell all listeners of a step, and show them a crop, before one of them may end the run for now."""
    over = None
    for listener in listeners:
        try:
            listener.step(told)
        except TimeOver as error:
            over = error
    if look is not None:
        look()
    if over is not None:
        raise over


def _show(run: Run, held: _Held, ranks: Ranks, listeners: Sequence[Listener]) -> None:
    """Show the listeners a validation crop; they are rank 0's."""
    if not held.crops or not listeners:
        return
    look = held.look(run, max(1, run.step // run.options.checkpoint_every), ranks.device)
    for listener in listeners:
        listener.look(look)


def _tell(run: Run, first: int, seconds: float, waited: float) -> None:
    if run.pace.over(run.options) and run.step < run.options.steps:
        _LOGGER.info(
            "ended at step %d of %d: the validation loss has not fallen for %d epochs",
            run.step,
            run.options.steps,
            run.pace.since_best,
        )
    if run.step > first:
        _LOGGER.info(
            "%d steps in %.0f s; the network waited %.1f %% of the time for crops",
            run.step - first,
            seconds,
            100 * waited / seconds,
        )
