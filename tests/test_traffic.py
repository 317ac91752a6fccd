"""What is asked of a remote store is counted, here and in other processes, and what came twice is known."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

from tomocpt_stream.traffic import Traffic


def test_bytes_that_came_twice_are_stored_once() -> None:
    traffic = Traffic()
    assert traffic.stored == 0
    for key, start, size in (("a", 0, 100), ("a", 50, 100), ("b", 10, 5), ("a", 0, 100), ("a", 60, 10)):
        traffic.add(size, key, start)
    traffic.add(0, "absent")
    assert (traffic.requests, traffic.bytes, traffic.stored) == (6, 315, 155)


def test_what_was_taken_is_not_counted_again_and_adds_up() -> None:
    ours, theirs = Traffic(), Traffic()
    ours.add(100, "a")
    theirs.add(100, "a")
    theirs.add(7, "b")
    taken = pickle.loads(pickle.dumps(theirs.take()))
    assert (theirs.requests, theirs.bytes, theirs.stored) == (0, 0, 0)
    theirs.add(1, "c")
    assert (taken.requests, taken.bytes, taken.stored) == (2, 107, 107)
    ours.include(taken)
    assert (ours.requests, ours.bytes, ours.stored) == (3, 207, 107)
    ours.include(Traffic())
    assert (ours.requests, ours.bytes, ours.stored) == (3, 207, 107)
    taken.add(1, "d")  # of its own, with a lock of its own
    assert ours.requests == 3


def test_several_threads_count_and_none_is_lost() -> None:
    traffic, taken = Traffic(), Traffic()

    def count(number: int) -> None:
        for turn in range(500):
            traffic.add(2, str(number), turn)
            if turn % 50 == 0:
                taken.include(traffic.take())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    taken.include(traffic.take())
    assert (taken.requests, taken.bytes, taken.stored) == (2000, 4000, 4 * 501)
