"""Two claimants of one store: real processes that begin at once, and one that comes in between."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.storage import WrapperStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from zarr.abc.store import Store

PREAMBLE = """
import json, sys, time
from pathlib import Path

GATE, ME, COUNT = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def meet(place):
    # Return in every process at the same moment.
    folder = GATE / str(place)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(ME)).touch()
    while len(list(folder.iterdir())) < COUNT:
        pass
"""


def race(code: str, gate: Path, *arguments: str, count: int = 2) -> list[Any]:
    """Run `code` in `count` processes; return the JSON that each prints last.

    In it `ME` is the number of the process and `meet(n)` waits for the others; sys.argv[4:] are
    `arguments`.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, str(gate), str(number), str(count), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for number in range(count)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count
    return [json.loads(lines.splitlines()[-1]) for lines in printed]


class Interrupted(WrapperStore[Any]):
    """A store that runs `action` once: when `method` is called for `key`, before it does anything but get.

    Getting happens first, so that what it returns is out of date.
    """

    def __init__(self, store: Store, method: str, key: str, action: Callable[[], object]) -> None:
        super().__init__(store)
        self._when = (method, key)
        self._action = action
        self.happened = False

    def _with_store(self, store: Store) -> Interrupted:
        copy = Interrupted(store, *self._when, self._action)
        copy.happened = True  # once is enough
        return copy

    async def _interrupt(self, *call: str) -> None:
        if call == self._when and not self.happened:
            self.happened = True
            await asyncio.to_thread(self._action)

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        found = await super().get(key, *arguments, **options)
        await self._interrupt("get", key)
        return found

    async def set(self, key: str, value: Any) -> None:
        await self._interrupt("set", key)
        await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        await self._interrupt("put", key)
        await super().set_if_not_exists(key, value)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        await self._interrupt("list", prefix)
        async for key in self._store.list_prefix(prefix):
            yield key
