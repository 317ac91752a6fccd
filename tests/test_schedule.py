from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomocpt_stream import schedule
from tomocpt_stream.schedule import AS_GOOD, end, ends_between, first_to_finish

AXIS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3)


def _played(tasks: list[int], workers: int) -> int:
    """The definition, window by window: whoever is idle takes the next task."""
    queue, left, clock = list(tasks), [0] * workers, 0
    while queue or any(left):
        for worker in range(workers):
            if not left[worker] and queue:
                left[worker] = queue.pop(0)
        left = [max(0, windows - 1) for windows in left]
        clock += 1
    return clock


def _numbers(cuts: Any, choice: Any) -> list[int]:
    return [a * b * c for a, b, c in product(*(axis[k] for axis, k in zip(cuts, choice, strict=True)))]


def _bounds(tasks: list[int], workers: int) -> Any:
    count, total, largest = (np.array([number]) for number in (len(tasks), sum(tasks), max(tasks)))
    return ends_between(count, total, largest, workers)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 9))
def test_an_idle_worker_takes_the_next_task(tasks: Any, workers: int) -> None:
    assert end(tasks, workers) == _played(tasks, workers)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_the_end_lies_between_its_bounds(tasks: Any, workers: int) -> None:
    (lower,), (upper,) = _bounds(tasks, workers)
    assert lower <= end(tasks, workers) <= upper


@pytest.mark.parametrize("tasks", [[7] * 12, [7] * 13, [7] * 16])
def test_the_bounds_of_equal_tasks_are_their_end(tasks: Any) -> None:
    assert _bounds(tasks, 4)[1] == end(tasks, 4) == 7 * math.ceil(len(tasks) / 4)


@given(st.tuples(AXIS, AXIS, AXIS), st.integers(1, 9), st.data())
def test_the_choice_is_the_cheapest_of_the_first_to_finish(cuts: Any, workers: int, data: Any) -> None:
    shape = tuple(len(axis) for axis in cuts)
    sizes = st.lists(st.integers(1, 5), min_size=math.prod(shape), max_size=math.prod(shape))
    needed = np.array(data.draw(sizes)).reshape(shape)
    limit = data.draw(st.integers(int(needed.min()), 5))
    found = first_to_finish(cuts, needed, limit=limit, workers=workers)

    within = [choice for choice in product(*map(range, shape)) if needed[choice] <= limit]
    ends = {choice: _played(_numbers(cuts, choice), workers) for choice in within}
    if any(len(_numbers(cuts, choice)) > 8 * workers for choice in within):  # bounds stand in for these
        assert ends[found] <= 1.13 * AS_GOOD * min(ends.values())
        return
    equals = [choice for choice in within if ends[choice] <= AS_GOOD * min(ends.values())]
    cost = {c: (sum(_numbers(cuts, c)), len(_numbers(cuts, c)), needed[c], c) for c in equals}
    assert found == min(equals, key=lambda choice: cost[choice])


def _choose(line: Any, *, workers: int = 2, needed: Any = None) -> int:
    """Return which cut of one axis is taken; the other axes are whole."""
    needed = [1] * len(line) if needed is None else needed
    shaped = np.array(needed, dtype=np.int64).reshape(-1, 1, 1)
    return first_to_finish([line, [(1,)], [(1,)]], shaped, limit=max(needed), workers=workers)[0]


def test_of_those_that_end_about_as_early_the_cheapest_is_taken() -> None:
    assert _choose([(50, 50), (52, 20)]) == 1  # 4 % later, for less work
    assert _choose([(50, 50), (53, 10)]) == 0  # 6 % later
    assert _choose([(50, 51), (50, 25, 25)]) == 1  # fewest windows before fewest tasks
    assert _choose([(50, 25, 25), (50, 50)], needed=[1, 9]) == 1  # fewest tasks before fewest bytes
    assert _choose([(50, 50), (50, 50)], needed=[9, 1]) == 1
    assert _choose([(50, 50), (50, 50)]) == 0


def test_the_bound_of_many_tasks_counts_the_small_ones_as_small() -> None:
    assert _choose([(180,), (100,) + (1,) * 100]) == 1


def test_the_end_of_few_tasks_is_counted_out() -> None:
    assert _choose([(70, 20), (40, 40, 20, 20)]) == 1  # ends at 60; its bound is 80


@pytest.mark.parametrize(("workers", "least"), [(2, 16), (4, 32), (1000, 1024)])
def test_many_tasks_are_not_counted_out(monkeypatch: pytest.MonkeyPatch, workers: int, least: int) -> None:
    counted: list[int] = []

    def count(tasks: Any, workers: int) -> int:
        tasks = list(tasks)
        counted.append(len(tasks))
        return end(tasks, workers)

    monkeypatch.setattr(schedule, "end", count)
    _choose([(2**14 // n,) * n for n in (8, 16, 32, 64, 1024, 2048, 4096)], workers=workers)
    assert max(counted) == least


def test_numbers_of_windows_that_no_32_bits_hold() -> None:
    line = [(30_000,), (15_000,) * 2]
    needed = np.ones((2, 2, 2), dtype=np.int64)
    assert first_to_finish([line] * 3, needed, limit=1, workers=8) == (1, 1, 1)
    assert first_to_finish([line] * 3, needed, limit=1, workers=1) == (0, 0, 0)
