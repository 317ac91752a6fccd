"""Errors that a caller can act on: each says what was found, what was expected, what to do."""

from __future__ import annotations


class ActionableError(Exception):
    """Base of every error of the package; `found`, `expected` and `remedy` are whole phrases.

    The message reads "<found>; expected <expected>; <remedy>". `final`: neither trying again nor going
    on with other tasks can help.
    """

    final = False

    def __init__(self, found: str, *, expected: str, remedy: str) -> None:
        super().__init__(f"{found}; expected {expected}; {remedy}")
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the three phrases, so that the error survives pickling by a worker."""
        return (_rebuild, (type(self), self.found, self.expected, self.remedy))


def _rebuild(kind: type[ActionableError], found: str, expected: str, remedy: str) -> ActionableError:
    return kind(found, expected=expected, remedy=remedy)


class SourceError(ActionableError, ValueError):
    """A tomogram or mask that cannot be read, or whose voxels cannot be used."""


class BrokenSourceError(SourceError):
    """A source that the next try will find as it is: gone, incomplete, or with voxels of no use."""

    final = True


class FloodError(SourceError):
    """A map with so many candidates that it cannot be one of centroids."""

    final = True


class PlanError(ActionableError, ValueError):
    """A plan that does not fit its memory budget, its volume or its options."""

    final = True


class CheckpointError(ActionableError, ValueError):
    """A picker file, or a store of an earlier run, that does not fit what was asked for."""


class DuplicateError(CheckpointError):
    """Two runs of one task that ended with different bytes."""

    final = True


class FormatError(ActionableError, ValueError):
    """A coordinate file that cannot be read or written without guessing."""


class PortalError(ActionableError, ConnectionError):
    """The CZ CryoET Data Portal did not answer, or its answer cannot be used."""


class JobError(ActionableError, RuntimeError):
    """A bulk job that could not do everything asked for."""


class FullStoreError(JobError):
    """A disk that has no room left, or takes no writes; every other task would end there too."""

    final = True
