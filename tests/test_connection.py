"""The way to a running cluster: addresses, scheduler files, and what is said where nobody answers."""

from __future__ import annotations

import json
import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from distributed import LocalCluster

from tomocpt_stream.connection import await_worker, connect, on_this_machine
from tomocpt_stream.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Client


@pytest.fixture
def quiet_port() -> Iterator[str]:
    """An address at which somebody listens and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def address(workers: Client) -> str:
    """The scheduler of two workers."""
    return str(workers.scheduler_info(n_workers=0)["address"])


def test_an_address_leads_to_its_workers(workers: Client, address: str) -> None:
    with connect(address) as client:
        assert len(client.nthreads()) == 2
        assert on_this_machine(client)
    assert client.status == "closed"
    assert len(workers.nthreads()) == 2  # the cluster is left as it was


@pytest.mark.parametrize("name", ["scheduler.json", "scheduler"])
def test_a_scheduler_file_leads_to_its_workers(address: str, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(json.dumps({"id": "Scheduler-3", "address": address}))
    with connect(str(file)) as client:
        assert len(client.nthreads()) == 2


def test_a_scheduler_file_may_come_late(address: str, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    text = json.dumps({"address": address})
    file.write_text(text[:9])
    writer = threading.Timer(0.3, lambda: file.write_text(text))
    writer.start()
    with connect(str(file)) as client:
        assert len(client.nthreads()) == 2
    writer.join()


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("gone.json", None, "there is no scheduler file"),
        ("half.json", '{"address": "tcp:', "names no scheduler"),
        ("other.json", '{"id": 3}', "names no scheduler"),
        ("list.json", "[3]", "names no scheduler"),
        ("odd.json", '{"address": "here"}', "'here', which .*odd.json names, is no address"),
    ],
)
def test_a_scheduler_file_of_no_use_is_named(tmp_path: Path, name: str, text: str | None, found: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(JobError, match=found), connect(str(tmp_path / name), timeout=0.01):
        pytest.fail("connected")


@pytest.mark.parametrize("word", ["host", "", "127.0.0.1", "http://127.0.0.1:8786"])
def test_a_word_that_is_no_address(word: str) -> None:
    with pytest.raises(JobError, match="is no address of a scheduler"), connect(word):
        pytest.fail("connected")


def test_a_scheduler_that_does_not_answer(quiet_port: str, tmp_path: Path) -> None:
    with (
        pytest.raises(JobError, match=f"no scheduler answers at {quiet_port} within 0.1 s"),
        connect(quiet_port, timeout=0.1),
    ):
        pytest.fail("connected")
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"address": quiet_port}))
    with (
        pytest.raises(JobError, match=f"at {quiet_port}, which .*old.json names, within") as caught,
        connect(str(file), timeout=0.1),
    ):
        pytest.fail("connected")
    assert "dask scheduler" in caught.value.remedy


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("tcp://127.0.0.1:8786", True),
        ("tls://127.8.0.1:8786", True),
        ("tcp://[::1]:8786", True),
        ("tcp://localhost:8786", True),
        ("inproc://10.0.0.3/33/1", True),
        ("tcp://10.0.0.3:8786", False),
        ("tcp://[fe80::1]:8786", False),
        ("tcp://login.cluster.example:8786", False),
        ("tcp://127.example:8786", False),
    ],
)
def test_loopback_is_this_machine(address: str, *, here: bool) -> None:
    assert on_this_machine(SimpleNamespace(scheduler=SimpleNamespace(address=address))) is here


def test_a_cluster_that_adapts_is_asked_for_its_first_worker() -> None:
    quiet = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=0, processes=False, protocol="tcp", **quiet) as cluster:
        cluster.adapt(minimum=0, maximum=1, interval="20ms", wait_count=1_000)
        with connect(cluster.scheduler_address) as client:
            assert not client.nthreads()
            await_worker(client)
            assert len(client.nthreads()) == 1


def test_a_scheduler_lost_while_waiting_is_named() -> None:
    with (
        LocalCluster(
            n_workers=0, processes=False, protocol="tcp", dashboard_address="127.0.0.1:0"
        ) as cluster,
        connect(cluster.scheduler_address) as client,
    ):
        losing = threading.Timer(0.2, cluster.close)
        losing.start()
        with pytest.raises(JobError, match=f"{cluster.scheduler_address} was lost while its first worker"):
            await_worker(client)
        losing.join()
