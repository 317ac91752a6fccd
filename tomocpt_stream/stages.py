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
from itertools import islice
from traceback import clear_frames
from typing import Any, Generic, Protocol, TypeVar

from tomocpt_stream.errors import ActionableError, JobError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Report = Callable[[Mapping[str, float]], None]
"""Called by a job with what it has done so far: numbers that only grow, "done" among them."""

TRIES = 3
# Without a single success, so many failed jobs say that the rest would fail too.
HOPELESS = 8
# Failed jobs that an error names; of the others it says how many there are.
_NAMED = 3
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
    """One job: `label` names its box to people, as no other of its stage; its function gets `payload`."""

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
    """Which jobs have failed, and what is to be done about it; a job is known by its label."""

    def __init__(self, stage: Stage[Any]) -> None:
        self._stage = stage
        # The jobs that failed and are to be tried again: how often they were tried, and when they may be.
        self._failing: dict[str, tuple[int, float]] = {}
        self._given_up = 0
        self._labels: list[str] = []  # of the first few that were given up
        self._cause: tuple[int, BaseException] | None = None  # tries and error of the first of them
        self._any_success = False

    def succeeded(self, job: Job) -> None:
        """Take note of a job that is finished."""
        self._any_success = True
        self._failing.pop(job.label, None)

    def failed(self, job: Job, error: BaseException, *, most: float | None = None) -> bool:
        """Take note of a failure and return whether to try again, `most` times in all (None: `tries`).

        Raises the error itself where nothing can help, and that of `settle` where all jobs fail.
        """
        stage = self._stage
        if isinstance(error, ActionableError) and error.final:
            error.add_note(f"in {stage.name} of {stage.tomogram}: {job.label}")
            raise error
        let_go(error)
        tries = self._failing.pop(job.label, (0, 0.0))[0] + 1
        hopeless = not self._any_success and self._given_up + len(self._failing) + 1 >= HOPELESS
        if tries < (stage.tries if most is None else most) and not hopeless:
            self._failing[job.label] = tries, time.monotonic() + 0.05 * 4**tries
            return True
        self._given_up += 1
        if len(self._labels) < _NAMED:
            self._labels.append(job.label)
        self._cause = self._cause or (tries, error)
        if hopeless:
            self.settle()
        return False

    def delay(self, job: Job) -> float:
        """Return the seconds until a job may be tried again: 0.2 after its first failure, 0.8 after the next.

        That gives a failing store a moment.
        """
        _, due = self._failing.get(job.label, (0, 0.0))
        return max(0.0, due - time.monotonic())

    def wait(self, job: Job) -> None:
        """Return when a job may be tried again."""
        time.sleep(self.delay(job))

    def settle(self) -> None:
        """Raise the error that names the jobs that were given up, if there are any."""
        if self._cause is None:
            return
        tries, cause = self._cause
        count = self._given_up + len(self._failing)
        first, *others = [*self._labels, *islice(self._failing, _NAMED)][:_NAMED]
        if count > _NAMED:
            others.append(f"{count - _NAMED} more")
        why = cause.found if isinstance(cause, ActionableError) else f"{type(cause).__name__}: {cause}"
        found = (
            f"{self._stage.name} of {self._stage.tomogram}: {first} failed"
            + (f" {tries} times" if tries > 1 else "")
            + (f", also {', '.join(others)}; {count} of {self._stage.total} in all" if others else "")
            + (" and none has succeeded" if others and not self._any_success else "")
            + f": {why}"
        )
        if isinstance(cause, ActionableError):
            # A class with arguments of its own could not be made from the three phrases.
            kind = type(cause) if type(cause).__init__ is ActionableError.__init__ else JobError
            raise kind(found, expected=cause.expected, remedy=cause.remedy) from cause
        raise JobError(
            found,
            expected="every task to finish",
            remedy="mend what the message names and run again with the same store: what is done is kept",
        ) from cause


def let_go(error: BaseException) -> None:
    """Free what the frames of an error hold: a failed task's buffers, before the next task has its own."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        clear_frames(following.__traceback__)
        chain.append(following)
        following = following.__cause__ or following.__context__


class Residents:
    """What lives in a worker process from one job to the next.

    Opened addresses, of which the most recent few stay, and things that stay under a name.
    """

    def __init__(self) -> None:
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self._named: dict[str, Any] = {}
        self._makers: dict[str, Callable[[], Any]] = {}
        self._lock = threading.RLock()
        # Held while an address is opened, which may take long: keeping and dropping need not wait for it.
        self._opening = threading.Lock()

    def opened(self, address: Address[T]) -> T:
        """Return what an address opens; it is opened once, and again where it was not asked for lately."""
        with self._opening:
            with self._lock:
                if address.token in self._opened:
                    self._opened.move_to_end(address.token)
                    there: T = self._opened[address.token]
                    return there
            found = address.open()
            with self._lock:
                self._opened[address.token] = found
                while len(self._opened) > _KEPT:
                    self._opened.popitem(last=False)
            return found

    def keep(self, name: str, make: Callable[[], Any]) -> None:
        """Keep what `make` returns under a name; where it fails, it is called again by who asks for it."""
        with self._lock:
            self._makers[name] = make
            self.named(name)

    def drop(self, name: str) -> None:
        """Forget a thing, what is named as "... of <name>", and all addresses that may have opened it."""
        with self._lock:
            for there in [there for there in self._named if there == name or there.endswith(f" of {name}")]:
                del self._named[there]
            self._makers.pop(name, None)
            self._opened.clear()

    def named(self, name: str, make: Callable[[], Any] | None = None) -> Any:
        """Return the thing of a name; one that is not there is made, or is a JobError without `make`."""
        with self._lock:
            if name not in self._named:
                make = make or self._makers.get(name)
                if make is None:
                    raise JobError(
                        f"the worker does not hold the {name}",
                        expected="what was given to every worker before its first task",
                        remedy="run again: the worker may have been started again meanwhile",
                    )
                self._named[name] = make()
            self._makers.pop(name, None)  # it may hold what the thing was made of
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

    try:
        return function(payload, residents.opened(address), report), last
    except BaseException as error:
        let_go(error)
        raise
