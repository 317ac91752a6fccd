"""Jobs, what they share, and what becomes of those that fail; nothing here knows of dask.

A job is a few hundred bytes: what to do, by addresses and boxes. What all the jobs of a stage share is
opened from an address, once per process.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tomocpt_stream.errors import ActionableError, JobError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Report = Callable[[Mapping[str, float]], None]
"""Called by a job with what it has done so far: numbers that only grow, "done" among them."""

TRIES = 3
# Without a single success, so many failed jobs say that the rest would fail too.
HOPELESS = 8
# Opened addresses that a worker keeps: those of the tomograms that it works on, and a few before.
_KEPT = 4
# Seconds between two reports of one running job on a worker; each is a message to the scheduler.
_EVERY = 1.0


class Address(Protocol[T_co]):
    """Where the things lie that all jobs of a stage need; pickled with each job, so a few kB at most."""

    @property
    def token(self) -> str:
        """A word that is equal only for addresses that open the same."""

    def open(self) -> T_co:
        """Return what the jobs work with."""


@dataclass(frozen=True)
class Here(Generic[T]):
    """What is open already, for jobs in the calling process."""

    opened: T
    token: str = "here"

    def open(self) -> T:
        """Return it."""
        return self.opened


@dataclass(frozen=True)
class Job:
    """One job: `label` names its box to people, `payload` is what its function is called with."""

    label: str
    payload: Any


@dataclass(frozen=True)
class Stage(Generic[T]):
    """What a run of jobs does: `function(payload, opened, report)` over one tomogram.

    `name` is the stage ("predict"), `tomogram` the tomogram's name, `total` the number of jobs.
    """

    name: str
    tomogram: str
    function: Callable[[Any, T, Report], Any]
    address: Address[T]
    total: int
    tries: int = TRIES


class Attempts:
    """Which jobs have failed, and what is to be done about it."""

    def __init__(self, stage: Stage[Any]) -> None:
        self._stage = stage
        self._counts: dict[str, int] = {}
        self._given_up: dict[str, BaseException] = {}
        self._any_success = False

    def succeeded(self, job: Job) -> None:
        """Take note of a job that is finished."""
        self._any_success = True
        self._counts.pop(job.label, None)

    def failed(self, job: Job, error: BaseException, *, most: int | None = None) -> bool:
        """Take note of a failure and return whether to try again, `most` times in all (None: `tries`).

        Raises the error itself where nothing can help, and that of `settle` where all jobs fail.
        """
        most = self._stage.tries if most is None else most
        if isinstance(error, ActionableError) and error.final:
            raise error
        tries = self._counts[job.label] = self._counts.get(job.label, 0) + 1
        if tries >= most:
            self._given_up[job.label] = error
        if not self._any_success and len(self._counts) >= HOPELESS:
            self._given_up[job.label] = error
            self.settle()
        return tries < most

    def wait(self, job: Job) -> None:
        """Give a failing store a moment: 0.2 s before the second try, 0.8 s before the third."""
        tries = self._counts.get(job.label, 0)
        if tries:
            time.sleep(0.05 * 4**tries)

    def settle(self) -> None:
        """Raise the error that names the jobs that were given up, if there are any."""
        if not self._given_up:
            return
        label, cause = next(iter(self._given_up.items()))
        tries = self._counts[label]
        others = len(self._given_up) - 1
        why = cause.found if isinstance(cause, ActionableError) else f"{type(cause).__name__}: {cause}"
        found = (
            f"{self._stage.name} of {self._stage.tomogram}: {label} failed"
            + (f" {tries} times" if tries > 1 else "")
            + (f", and {others} more of the {self._stage.total} tasks" if others else "")
            + f": {why}"
        )
        if isinstance(cause, ActionableError):
            raise type(cause)(found, expected=cause.expected, remedy=cause.remedy) from cause
        raise JobError(
            found,
            expected="every task to finish",
            remedy="mend what the message names and run again with the same store: what is done is kept",
        ) from cause


class Residents:
    """What lives in a worker process from one job to the next.

    Opened addresses, of which the most recent few stay, and things that stay under a name.
    """

    def __init__(self) -> None:
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self._named: dict[str, Any] = {}
        self._lock = threading.RLock()

    def opened(self, address: Address[T]) -> T:
        """Return what an address opens; it is opened once, and again where it was not asked for lately."""
        with self._lock:
            if address.token not in self._opened:
                self._opened[address.token] = address.open()
                while len(self._opened) > _KEPT:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(address.token)
            found: T = self._opened[address.token]
            return found

    def keep(self, name: str, thing: Any) -> None:
        """Keep a thing under a name."""
        with self._lock:
            self._named[name] = thing

    def drop(self, name: str) -> None:
        """Forget a thing, and all addresses that may have opened it."""
        with self._lock:
            self._named.pop(name, None)
            self._opened.clear()

    def named(self, name: str, make: Callable[[], Any] | None = None) -> Any:
        """Return the thing of a name; one that is not there is made, or is a JobError without `make`."""
        with self._lock:
            if name not in self._named:
                if make is None:
                    raise JobError(
                        f"the worker does not hold the {name}",
                        expected="what was given to every worker before its first task",
                        remedy="run again: the worker may have been started again meanwhile",
                    )
                self._named[name] = make()
            return self._named[name]


residents = Residents()
"""Those of this process."""


def perform(
    function: Callable[[Any, T, Report], Any],
    address: Address[T],
    payload: Any,
    tell: Callable[[dict[str, float]], None],
) -> tuple[Any, dict[str, float]]:
    """Do one job on a worker; return its answer and the last numbers that it reported.

    `tell` passes numbers on to whoever watches, about once a second.
    """
    last: dict[str, float] = {}
    told = time.monotonic()

    def report(numbers: Mapping[str, float]) -> None:
        nonlocal told
        last.update(numbers)
        now = time.monotonic()
        if now - told >= _EVERY:
            told = now
            tell(dict(last))

    return function(payload, residents.opened(address), report), last
