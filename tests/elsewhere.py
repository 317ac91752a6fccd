"""Clients and clusters in processes of their own, which may be killed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Client

CLIENT = """
import pickle, sys
from pathlib import Path
from distributed import Client
from tomocpt_stream.heatmap import predict

request = pickle.loads(Path(sys.argv[2]).read_bytes())
with Client(sys.argv[1]) as client:
    predict(client=client, **request)
"""

# For tests.races: the clients begin at the same moment, each on a cluster and with a request of its own.
CLIENTS = """
import pickle
from distributed import Client
from tomocpt_stream.heatmap import predict

address, path = sys.argv[4 + 2 * ME : 6 + 2 * ME]
request = pickle.loads(Path(path).read_bytes())
with Client(address) as client:
    meet("start")
    heatmap = predict(client=client, **request)
print(json.dumps(heatmap.finished))
"""

CLUSTER = """
import sys
from tomocpt_stream.cluster import local_cluster

if __name__ == "__main__":
    with local_cluster(1, memory_limit=0) as client:
        print(client.scheduler.address, flush=True)
        sys.stdin.read()
"""


@contextmanager
def client_elsewhere(
    workers: Client, folder: Path, request: dict[str, Any]
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `predict` on workers of this one."""
    (folder / "request").write_bytes(pickle.dumps(request))
    arguments = [address_of(workers), str(folder / "request")]
    process = subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def cluster_elsewhere(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a scheduler and a worker, and the scheduler's address."""
    script = folder / "cluster.py"
    script.write_text(CLUSTER)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def address_of(client: Client) -> str:
    """The address of a client's scheduler."""
    return str(client.scheduler_info(n_workers=0)["address"])


def running(client: Client) -> int:
    """How many tasks the threads of the workers are at, whether or not anyone waits for them."""
    return sum(client.run(lambda dask_worker: len(dask_worker.active_threads)).values())
