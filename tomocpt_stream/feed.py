"""Crops for the network, drawn by threads ahead of it and handed over in the order of the steps."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from tomocpt_stream.crops import Batch, Sampling, check_examples, draw_batch
from tomocpt_stream.epochs import Epochs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from tomocpt_stream.crops import Example
    from tomocpt_stream.train_options import TrainOptions

# Threads that draw crops, and how many steps they may be ahead of the network.
_THREADS = 8
_AHEAD = 2


class Crops(NamedTuple):
    """A `Batch` as tensors, each (n, z, y, x)."""

    voxels: torch.Tensor
    label: torch.Tensor
    known: torch.Tensor | None

    def to(self, device: torch.device) -> Crops:
        """Return the crops on a device; from pinned memory the copy does not hold up the caller."""
        known = None if self.known is None else self.known.to(device, non_blocking=True)
        return Crops(
            self.voxels.to(device, non_blocking=True), self.label.to(device, non_blocking=True), known
        )

    def pinned(self) -> Crops:
        """Return the crops in memory that a GPU copies from by itself."""
        known = None if self.known is None else self.known.pin_memory()
        return Crops(self.voxels.pin_memory(), self.label.pin_memory(), known)


class Feed:
    """Iterates over `draw(item)` of all items in their order, while threads draw those to come.

    Not more than two items a thread are drawn ahead. `waited` is the seconds that the last one was waited
    for. An error of `draw` is raised where its item is due. Used as a context, whose end stops the threads.
    """

    def __init__(
        self, draw: Callable[[int], Crops], items: Iterable[int], *, threads: int = 1, pin: bool = False
    ) -> None:
        self.waited = 0.0
        self._draw, self._items, self._pin = draw, iter(items), pin
        self._ahead = _AHEAD * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crops")
        self._drawn: deque[Future[Crops]] = deque()

    def __enter__(self) -> Feed:
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Crops:
        if not self._drawn:
            raise StopIteration
        began = time.perf_counter()
        crops = self._drawn.popleft().result()
        self.waited = time.perf_counter() - began
        self._fill()
        return crops

    def _fill(self) -> None:
        while len(self._drawn) < self._ahead:
            item = next(self._items, None)
            if item is None:
                return
            self._drawn.append(self._pool.submit(self._one, item))

    def _one(self, item: int) -> Crops:
        crops = self._draw(item)
        return crops.pinned() if self._pin else crops


def loader_threads(device: torch.device, *, ranks: int = 1) -> int:
    """Return how many threads draw crops: one beside a network on the CPU, which needs the cores itself."""
    if device.type == "cpu":
        return 1
    return max(1, min(_THREADS, (os.cpu_count() or 1) // ranks))


def step_crops(
    examples: Sequence[Example] | Epochs,
    options: TrainOptions,
    step: int,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Crops:
    """Return those crops of a step that fall to one of `ranks` devices: every so many-th, by place.

    Where there are fewer crops than devices, one without a crop gets the first with nothing known, which
    counts nowhere.
    """
    if not isinstance(examples, Epochs):
        size, seed = options.batch_size, options.seed
        whole = draw_batch(examples, options.sampling, size=size, seed=seed, step=step)
        return _share(whole, rank, ranks)
    if ranks == 1:
        return _tensors(examples.batch(options.batch_size, step))
    # A crop is the same in any batch, so that a device reads its own ones only.
    epoch, place = divmod(step, examples.steps(options.batch_size))
    first = place * options.batch_size
    mine = range(first + rank, min(len(examples), first + options.batch_size), ranks)
    single = [examples.batch(1, epoch * len(examples) + row) for row in mine or [first]]
    return _tensors(_joined(single) if mine else _unknown(single[0]))


def held_crops(
    validation: Sequence[Example] | Epochs, options: TrainOptions
) -> tuple[Callable[[int], Crops], int]:
    """Return what draws the crop of a place, and how many there are, always the same ones.

    The validation loss is their mean; they are never those of a training step.
    """
    if isinstance(validation, Epochs):
        return lambda place: _tensors(validation.batch(1, place)), min(
            len(validation), options.validation_crops
        )
    if not validation:
        return _no_crop, 0
    check_examples(validation, "validation")
    asked = options.sampling
    plain = Sampling(asked.window, asked.radius, asked.label, widths=asked.widths)
    seed = 2**31 + options.seed

    def drawn(place: int) -> Crops:
        return _tensors(draw_batch(validation, plain, size=1, seed=seed, step=place))

    return drawn, options.validation_crops


def _no_crop(place: int) -> Crops:
    raise IndexError(place)


def _share(whole: Batch, rank: int, ranks: int) -> Crops:
    alone = rank >= len(whole.voxels)
    rows = slice(1) if alone else slice(rank, None, ranks)
    known = None if whole.known is None else whole.known[rows]
    share = Batch(whole.voxels[rows], whole.label[rows], known)
    return _tensors(_unknown(share) if alone else share)


def _joined(batches: Sequence[Batch]) -> Batch:
    voxels, label = (np.concatenate([one[k] for one in batches]) for k in (0, 1))
    if all(one.known is None for one in batches):
        return Batch(voxels, label)
    known = [np.ones(one.label.shape, dtype=np.bool_) if one.known is None else one.known for one in batches]
    return Batch(voxels, label, np.concatenate(known))


def _unknown(batch: Batch) -> Batch:
    return batch._replace(known=np.zeros(batch.label.shape, dtype=np.bool_))


def _tensors(batch: Batch) -> Crops:
    known = None if batch.known is None else torch.from_numpy(np.ascontiguousarray(batch.known))
    return Crops(
        torch.from_numpy(np.ascontiguousarray(batch.voxels)),
        torch.from_numpy(np.ascontiguousarray(batch.label)),
        known,
    )
