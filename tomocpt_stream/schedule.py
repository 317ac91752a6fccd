"""When the last of many tasks ends, and which way of cutting a volume into tasks ends first.

Time is counted in windows. Workers are alike, and each takes the next task, in order, as it becomes
free. A volume is cut axis by axis, so that the windows of a task are a product of three numbers.
"""

from __future__ import annotations

from heapq import heapreplace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

# Cuts whose ends differ by less are equals: masks, fill and slow disks move an end by more.
AS_GOOD = 1.05
# Up to so many tasks, in all and a worker, the end is counted out; beyond, its bound is near enough.
_COUNTED_TASKS, _COUNTED_ROUNDS = 1024, 8


def first_to_finish(
    cuts: Sequence[Sequence[tuple[int, ...]]], needed: npt.NDArray[np.int64], *, limit: int, workers: int
) -> tuple[int, int, int]:
    """Return which cut of each axis to take so that the last task ends first, within `limit` bytes.

    `cuts` holds for each axis the cuts there are, a cut being the windows of its groups in order;
    `needed[z, y, x]` is the number of bytes that the largest task of a choice of three cuts takes. At
    least one choice must be within the limit. Of choices that end about as early (5 %), the one of
    fewest windows in all is taken, then of fewest tasks (each border is read twice), then of fewest
    bytes.
    """
    tasks, total, largest = _over(cuts, len), _over(cuts, sum), _over(cuts, max)
    lower, upper = ends_between(tasks, total, largest, workers)
    fits = np.flatnonzero(needed <= limit)
    best = int(upper[fits].min())
    ends: dict[int, int] = {}
    for choice in fits[np.argsort(lower[fits], kind="stable")].tolist():
        if lower[choice] > AS_GOOD * best:
            break
        ends[choice] = int(upper[choice])
        if tasks[choice] <= min(_COUNTED_TASKS, _COUNTED_ROUNDS * workers):
            z, y, x = (axis[k] for axis, k in zip(cuts, _place(choice, needed.shape), strict=True))
            ends[choice] = end((a * b * c for a, b, c in product(z, y, x)), workers)
        best = min(best, ends[choice])
    equals = (choice for choice, last in ends.items() if last <= AS_GOOD * best)
    found = min(equals, key=lambda choice: (total[choice], tasks[choice], needed.flat[choice], choice))
    return _place(found, needed.shape)


def end(tasks: Iterable[int], workers: int) -> int:
    """Return when the last task ends, given the windows of each task in order."""
    free = [0] * workers
    for windows in tasks:
        heapreplace(free, free[0] + windows)
    return max(free)


def ends_between(
    tasks: npt.NDArray[np.int64], total: npt.NDArray[np.int64], largest: npt.NDArray[np.int64], workers: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return bounds of `end` from the number of tasks, their windows in all and the largest's.

    The upper one is the lesser of two: all tasks as large as the largest, and Graham's (the last task
    to end begins no later than all others would take if shared out evenly).
    """
    lower = np.maximum(-(-total // workers), largest)
    rounds = -(-tasks // workers) * largest
    return lower, np.minimum(rounds, (total + (workers - 1) * largest) // workers)


def _over(
    cuts: Sequence[Sequence[tuple[int, ...]]], of: Callable[[tuple[int, ...]], int]
) -> npt.NDArray[np.int64]:
    """Return the product of a number of each axis' cut, flat, for every choice of three cuts."""
    z, y, x = np.ix_(*(np.array([of(cut) for cut in axis], dtype=np.int64) for axis in cuts))
    product_: npt.NDArray[np.int64] = z * y * x
    return product_.ravel()


def _place(choice: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    z, y, x = (int(k) for k in np.unravel_index(choice, shape))
    return z, y, x
