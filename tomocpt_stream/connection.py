"""The way to a dask cluster that runs already: by its scheduler's address, or by its scheduler file."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import time
import uuid
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tomocpt_stream.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Seconds between two looks for a scheduler file that a starting scheduler has yet to write.
_POLL = 0.2


@contextmanager
def connect(scheduler: str, *, timeout: float = 30.0) -> Iterator[Any]:
    """Yield a `distributed.Client` of a running scheduler; closing it leaves the cluster as it is.

    `scheduler` is an address such as "tcp://host:8786", or the path of a scheduler file, which is what
    ends in .json or is a file. A file that is not there yet is waited for. For programs that run no
    event loop of their own.

    Raises
    ------
    JobError
        No scheduler answers within `timeout` seconds.
    """
    from distributed import Client  # noqa: TID251  (loaded by those who have a cluster)

    deadline = time.monotonic() + timeout
    address = scheduler
    if scheduler.endswith(".json") or Path(scheduler).is_file():
        address = _address_in(Path(scheduler), deadline)
    named = f", which {scheduler} names," if address != scheduler else ""
    left = max(0.5, deadline - time.monotonic())
    try:
        asyncio.run(_greet(address, left))
        client = Client(address, timeout=left)
    except ValueError as error:
        raise _no_answer(f"{address!r}{named} is no address of a scheduler ({error})") from error
    except OSError as error:  # a time-out is one
        raise _no_answer(f"no scheduler answers at {address}{named} within {timeout:g} s") from error
    with client:
        yield client


def on_this_machine(client: Any) -> bool:
    """Return whether the scheduler of a client listens on loopback, so that all its workers are here."""
    parts = urlsplit(client.scheduler.address)
    if parts.scheme == "inproc" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def await_worker(client: Any) -> None:
    """Return once the cluster has a worker.

    It is asked for by a task that does nothing: a cluster that adapts starts no worker without one.
    Raises JobError where the scheduler is lost meanwhile.
    """
    key = f"wait for a worker-{uuid.uuid4().hex[:8]}"
    try:
        client.submit(os.getpid, key=key, pure=False).result()
    except CancelledError as error:
        raise JobError(
            f"the scheduler at {client.scheduler.address} was lost while its first worker was waited for",
            expected="a scheduler that answers until the end",
            remedy="start the cluster again and run again",
        ) from error


async def _greet(address: str, timeout: float) -> None:
    """Greet a scheduler once; TimeoutError where somebody listens and does not answer.

    A client would wait for the answer for ever.
    """
    from distributed.comm.core import connect as open_comm  # noqa: TID251
    from distributed.security import Security  # noqa: TID251

    arguments = Security().get_connection_args("client")
    comm = await asyncio.wait_for(open_comm(address, timeout=timeout, **arguments), timeout)
    await comm.close()


def _address_in(file: Path, deadline: float) -> str:
    """Return the address in a scheduler file; one that is missing or half-written is waited for."""
    while True:
        try:
            return str(json.loads(file.read_text())["address"])
        except FileNotFoundError:
            found = f"there is no scheduler file {file}"
        except (ValueError, KeyError, TypeError) as error:
            found = f"{file} names no scheduler ({type(error).__name__}: {error})"
        if time.monotonic() >= deadline:
            raise _no_answer(found)
        time.sleep(_POLL)


def _no_answer(found: str) -> JobError:
    return JobError(
        found,
        expected="the address or the scheduler file of a running dask scheduler",
        remedy="start one (`dask scheduler --scheduler-file FILE`) and give what it prints or writes; its "
        "own port, usually 8786, not the dashboard's",
    )
