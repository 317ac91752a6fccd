"""Answers of the portal on disk: whole or absent, with the time they were given.

Several processes may share a folder. Each writes an answer under a temporary name and renames it, so that
the last one stays; what is damaged counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tomocpt_stream.whole import write_whole

_LOGGER = logging.getLogger(__name__)
_VERSION = 1
# Seconds that the clock of another machine may be ahead of this one's.
_SKEW = 300.0
FOLDER_VARIABLE = "TOMOCPT_STREAM_PORTAL_CACHE"
"""The environment variable that names another folder for answers, or none where it is empty."""


@dataclass(frozen=True)
class Answer:
    """What the portal answered, and how many seconds ago."""

    content: Any
    age: float


class AnswerCache:
    """Answers in a folder, by the hash of what was asked; a `folder` of None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._failed = False

    def get(self, key: str) -> Answer | None:
        """Return an answer however old it is; None where there is none, or a damaged one."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
            if (
                entry["version"] != _VERSION
                or entry["key"] != key
                or entry["sha256"] != _digest(entry["content"])
            ):
                return None
            age = time.time() - float(entry["given"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        # From the future: nobody knows how old it is.
        return Answer(entry["content"], age if age >= -_SKEW else float("inf"))

    def put(self, key: str, content: Any) -> None:
        """Keep an answer; where that fails, say so once and go on."""
        if self.folder is None:
            return
        entry = {
            "version": _VERSION,
            "key": key,
            "given": time.time(),
            "sha256": _digest(content),
            "content": content,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(key), json.dumps(entry))
        except OSError as error:
            if not self._failed:
                _LOGGER.warning("answers of the portal are not kept in %s: %s", self.folder, error)
            self._failed = True

    def _path(self, key: str) -> Path:
        return (self.folder or Path()) / f"{key}.json"


def key_of(*asked: Any) -> str:
    """Return the hash of what was asked (plain data)."""
    return hashlib.sha256(json.dumps([_VERSION, *asked], sort_keys=True).encode()).hexdigest()


def usual_folder(url: str) -> Path | None:
    """Return the folder for answers of an endpoint, that of the user, or of TOMOCPT_STREAM_PORTAL_CACHE.

    None for a server on this machine: a port says too little about who answers on it next time.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    if urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1"):
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tomocpt-stream" / "portal"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
