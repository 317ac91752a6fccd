"""Files that appear whole: written under a temporary name, which takes the place of theirs at the end."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# A file system takes names of 255 bytes; a letter may have four of them.
_LETTERS = 40

PARTIAL = ".*.partial"
"""What temporary names look like, of which killed writers leave some behind."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which becomes `path` when the block ends without an error.

    Who writes the file there leaves nothing behind on an error, and what `path` was before stays. No two
    writers share a temporary name; of several at once the last one stays, whole.
    """
    temporary = path.with_name(
        f".{path.name[:_LETTERS]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial",
    )
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the error that is under way says more
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, so that it outlives a machine that stops right afterwards."""
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        settle(temporary)


def settle(path: Path) -> None:
    """Wait until the bytes of a file are on the disk: a rename must not outlive what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files of which none takes its name before all are written, in folders that are made."""
    with ExitStack() as stack:
        # The stack renames the last one first.
        for path, data in reversed(list(files.items())):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(whole(path)).write_bytes(data)
