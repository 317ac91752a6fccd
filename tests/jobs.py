"""Jobs for tests of the runner: what they do is seen by the marks that they leave in a folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomocpt_stream.dispatch import run_jobs
from tomocpt_stream.errors import ActionableError, DuplicateError, FloodError, PlanError, SourceError
from tomocpt_stream.stages import Job, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tomocpt_stream.stages import Report


@dataclass(frozen=True)
class Folder:
    """The address of a folder that all processes see."""

    path: str

    @property
    def token(self) -> str:
        return self.path

    def open(self) -> Marks:
        return Marks(Path(self.path))


class Marks:
    """Files that are made once, and counted: a job's way to say what it did, and a test's to let it go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, kind: str) -> int:
        """Leave one more mark of a kind; return how many there were before."""
        number = len(self.of(kind))
        while True:
            try:
                with (self.folder / f"{kind}.{number}").open("x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                number += 1
            else:
                return number

    def of(self, kind: str) -> list[int]:
        """Return the processes that left marks of a kind, first to last."""
        found = sorted(self.folder.glob(f"{kind}.*"), key=lambda path: int(path.suffix[1:]))
        return [int(path.read_text() or 0) for path in found]

    def wait_for(self, kind: str, count: int = 1) -> None:
        """Return when there are so many marks of a kind."""
        until((self.folder / f"{kind}.{count - 1}").exists)


def until(happened: Callable[[], object], seconds: float = 60) -> None:
    """Return as soon as something is so; after so many seconds it never will be."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "what is waited for does not happen"
        time.sleep(0.01)


def stage(folder: Path, total: int, function: Callable[..., Any] | None = None) -> Stage[Any]:
    """A stage of the tomogram TS_01 whose jobs leave marks in `folder`."""
    return Stage("predict", "TS_01", function or act, Folder(str(folder)), total)


def jobs(*deeds: str) -> Iterator[Job]:
    """One job for each deed: `task 1 of 3 (z 1)`, and so on."""
    for number, deed in enumerate(deeds, start=1):
        yield Job(f"task {number} of {len(deeds)} (z {number})", (number, deed))


class StrangeError(Exception):
    """It can be pickled but not unpickled: it does not say how it is made."""

    def __init__(self, tomogram: str, device: str) -> None:
        super().__init__(f"{tomogram} does not fit {device}")


class LockedError(Exception):
    """It cannot be pickled."""

    def __init__(self, what: str) -> None:
        super().__init__(what, threading.Lock())


class OwnError(ActionableError):
    """An error of the package's kind with arguments of its own."""

    def __init__(self, device: str) -> None:
        super().__init__(f"{device} is hot", expected="a cool one", remedy="wait")


_PHRASES: dict[str, str] = {"expected": "what is right", "remedy": "do better"}

ERRORS: dict[str, Callable[[], BaseException]] = {
    "value": lambda: ValueError("the device has stumbled"),
    "source": lambda: SourceError("no voxels", **_PHRASES),
    "plan": lambda: PlanError("no plan", **_PHRASES),
    "flood": lambda: FloodError("a flood", **_PHRASES),
    "duplicate": lambda: DuplicateError("another result", **_PHRASES),
    "strange": lambda: StrangeError("TS_01", "cuda:3"),
    "locked": lambda: LockedError("the device is locked"),
    "own": lambda: OwnError("cuda:3"),
}


def act(payload: tuple[int, str], marks: Marks, report: Report) -> int:
    """Do a deed and return the square of the job's number; every try leaves a mark "<number>-try"."""
    number, deed = payload
    tries = marks.leave(f"{number}-try") + 1
    report({"done": 1, "voxels": number})
    verb, _, what = deed.partition(" ")
    if verb == "fail" or (verb == "fail-once" and tries == 1):
        report({"seconds": 1000})  # in vain
        raise ERRORS[what]()
    if verb == "die" and tries <= int(what or 1_000_000):
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "await":  # until the test, or another job, has left a mark
        marks.wait_for(what)
    if verb == "tell":  # reports until the test has seen enough
        while not marks.of(what):
            report({"voxels": number, "seconds": tries})
            time.sleep(0.01)
    report({"done": 2})
    marks.leave(f"{number}-end")
    return number * number


def answers(marks: Marks, *deeds: str, client: Any, **options: Any) -> list[int]:
    """Run one job for each deed; return what they answered, in order."""
    run = run_jobs(stage(marks.folder, len(deeds)), jobs(*deeds), client=client, **options)
    return sorted(answer for _, answer in run)
