"""The devices that train one network together, a process each, by Lightning Fabric; or the only one.

Every rank holds the same weights and has its share of a step's crops. What is summed over all of them is
the same on each, so that all take the same decisions. Rank 0 is the caller's process, the others are
started for it and end with it.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from tomocpt_stream.errors import ActionableError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from torch import nn

# A rank waits so long for another one. Crops that come from afar may take their time.
_PATIENCE = timedelta(hours=1)
_READY = b"ready"
_FAREWELL = 60.0  # seconds that a process has to end by itself


class Ranks(Protocol):
    """What the loop asks of the devices; `rank` is this one of `count`."""

    rank: int
    count: int
    device: torch.device

    def join(self, network: nn.Module) -> nn.Module:
        """Return the network as one whose gradients are means over the ranks."""

    def backward(self, loss: torch.Tensor) -> None:
        """Find the gradients of a loss."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of each value."""

    def wait(self) -> None:
        """Return when every rank has come as far."""


class Alone:
    """One device in this process, by plain torch."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank, self.count = 0, 1
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def join(self, network: nn.Module) -> nn.Module:
        """Return the network itself."""
        return network

    def backward(self, loss: torch.Tensor) -> None:
        """Find the gradients of a loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values

    def wait(self) -> None:
        """Return at once."""


class Together:
    """One of several processes with a device each; NCCL carries sums between GPUs, gloo between CPUs."""

    def __init__(self, rank: int, count: int, port: int) -> None:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies.ddp import DDPStrategy

        self.rank, self.count = rank, count
        self._fabric = Fabric(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=count,
            strategy=DDPStrategy(cluster_environment=_environment(rank, count, port), timeout=_PATIENCE),
        )
        self._fabric.launch()
        self.device = self._fabric.device

    def join(self, network: nn.Module) -> nn.Module:
        """Return the network as one whose gradients are means over the ranks."""
        joined: nn.Module = self._fabric.setup_module(network)
        return joined

    def backward(self, loss: torch.Tensor) -> None:
        """Find the gradients of a loss."""
        with warnings.catch_warnings():
            # Of a kernel of 1 x 1 x 1 channels last and first are the same bytes by other strides.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self._fabric.backward(loss)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of each value."""
        total = self._fabric.all_reduce(values.detach().clone(), reduce_op="sum")
        return cast("torch.Tensor", total)  # of a tensor; of a table it would be a table

    def wait(self) -> None:
        """Return when every rank has come as far."""
        self._fabric.barrier()


def check_devices(devices: int) -> None:
    """Raise PlanError where so many devices are not to be had."""
    present = torch.cuda.device_count()
    if devices < 1 or (present and devices > present):
        raise PlanError(
            f"{devices} devices",
            expected=f"from 1 to {present}, the GPUs here" if present else "at least 1",
            remedy="ask for fewer",
        )
    if devices == 1:
        return
    try:
        import lightning.fabric  # noqa: F401
    except ImportError as error:
        raise PlanError(
            f"{devices} devices without the package lightning ({error})",
            expected="lightning 2.6 or newer, which makes them work together",
            remedy="pip install 'tomocpt-stream[train]', or train on one device",
        ) from error


@contextmanager
def start(devices: int, work: Callable[[Ranks], None]) -> Iterator[Ranks]:
    """Yield rank 0 of `devices`, while new processes each call `work` with one of the others.

    `work` is pickled, and a script that comes here guards its entry with `if __name__ == "__main__"`. An
    error of another rank is raised here. At the end, and when this process dies, the others end.
    """
    if devices == 1:
        yield Alone()
        return
    port, context = _free_port(), get_context("spawn")
    others: list[tuple[BaseProcess, Connection]] = []
    try:
        threads = max(1, torch.get_num_threads() // devices)
        for rank in range(1, devices):
            here, there = context.Pipe(duplex=False)
            asked = (work, rank, devices, port, threads, there)
            others.append((context.Process(target=_work, args=asked, daemon=True), here))
            others[-1][0].start()
            there.close()
        for process, here in others:
            _await(process, here)
        yield Together(0, devices, port)
        for process, _ in others:
            process.join(_FAREWELL)
    except Exception as error:
        _raise_first(others, error)
        raise
    finally:
        for process, here in others:
            process.terminate()
            process.join()
            here.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _work(
    work: Callable[[Ranks], None], rank: int, count: int, port: int, threads: int, report: Connection
) -> None:
    """Do a rank's work in a process of its own; what goes wrong is reported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 is interrupted, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    report.send_bytes(_READY)
    try:
        work(Together(rank, count, port))
    except BaseException as error:
        report.send_bytes(_pickled(error))
        raise SystemExit(1) from None
    torch.distributed.destroy_process_group()


def _await(process: BaseProcess, here: Connection) -> None:
    """Return when a process is about to work; PlanError where it ends before."""
    wait([here, process.sentinel])
    with suppress(EOFError, OSError):
        if here.poll() and here.recv_bytes() == _READY:
            return
    process.join()
    raise PlanError(
        f"a process for another device that ended at its start (exit code {process.exitcode})",
        expected="a script that a new process can import",
        remedy='call this below `if __name__ == "__main__":`',
    )


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pickled(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an error of any library; some take other arguments than they keep
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def _raise_first(others: list[tuple[BaseProcess, Connection]], error: Exception) -> None:
    """Raise what another rank failed of, where this one only noticed that the other has gone."""
    if isinstance(error, ActionableError):
        return
    for process, here in others:
        process.join(5)
        with suppress(EOFError, OSError):
            if here.poll():
                raise pickle.loads(here.recv_bytes()) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(rank: int, count: int, port: int) -> Any:
    """Return how Fabric finds the other processes: all on this machine, started already."""
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

    class Here(ClusterEnvironment):
        creates_processes_externally = True
        main_address = "127.0.0.1"
        main_port = port

        @staticmethod
        def detect() -> bool:
            return False

        def world_size(self) -> int:
            return count

        def set_world_size(self, size: int) -> None:
            pass

        def global_rank(self) -> int:
            return rank

        def set_global_rank(self, rank: int) -> None:
            pass

        def local_rank(self) -> int:
            return rank

        def node_rank(self) -> int:
            return 0

    return Here()
