"""What long work reports while it runs; a terminal, a log or a test may listen."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the stage's name and the voxels done and in all; never asked for an answer."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `done` of `total` voxels of `stage` are finished."""


def silent(stage: str, done: int, total: int) -> None:
    """Ignore every report."""
