"""Fixtures that every test module may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from tests.buckets import S3, Way
    from tests.portal_server import PortalServer
    from tests.watched import Undisturbed
    from tomocpt_stream.portal_queries import PortalAPI

# A run in the background of a shell ignores SIGINT, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Torch and BLAS must not fight over two cores when several tests run workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real and simulated test data beside the checkout; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared test data is not here")
    return folder


@pytest.fixture(scope="session")
def workers() -> Iterator[Client]:
    """A client of two worker processes on this machine, the same for all tests that ask."""
    from tests.clusters import cluster

    with cluster(2) as client:
        yield client


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server, a bucket, and the way to it, which a test may make slow or broken."""
    from tests.buckets import S3, Bucket, s3_server, way_to

    with s3_server() as server, way_to(server) as way:
        yield S3(Bucket(server, "tomograms"), way)


@pytest.fixture
def way(s3: S3) -> Iterator[Way]:
    """The way to the S3 server, straight and with nothing asked yet."""
    s3.way.reset()
    yield s3.way
    s3.way.reset()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run that nothing disturbed: nine tasks of two chunks, which score each window once."""
    from tests.watched import undisturbed_run

    return undisturbed_run(tmp_path_factory.mktemp("cropped"), "crop", 30)


@pytest.fixture(scope="module")
def running() -> Iterator[PortalServer]:
    """The stand-in of the portal, with the small world; a module may have another world."""
    from tests.portal_rows import small_world
    from tests.portal_server import portal_server

    with portal_server(small_world()) as server:
        yield server


@pytest.fixture
def server(running: PortalServer) -> Iterator[PortalServer]:
    """The stand-in of the portal, without faults and with nothing asked yet."""
    running.reset()
    yield running
    running.reset()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made before the portal was asked again, which are short; pages are small."""
    from tests.portal_questions import be_quick

    return be_quick(monkeypatch)


@pytest.fixture
def api(server: PortalServer, monkeypatch: pytest.MonkeyPatch) -> PortalAPI:
    """The way to the stand-in, without a cache and without pauses."""
    from tomocpt_stream import portal_exchange
    from tomocpt_stream.portal_queries import PortalAPI

    monkeypatch.setattr(portal_exchange, "pause_before", lambda _: 0.0)
    return PortalAPI(server.url, cache=False, timeout=(2, 5), budget=5)
