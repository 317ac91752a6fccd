"""Tomograms on an object store: bytes fetched over bytes stored, requests, and time under latency.

    python benchmarks/bench_sources.py
    python benchmarks/bench_sources.py --shape 64 256 256 --write

An S3 server on loopback holds one tomogram in several layouts; a proxy in front of it counts requests and
bytes. The tomogram is streamed onto a working grid of 1.45 times its voxel size, as picking a large
particle does: faces, fill, voxels. Then a server that is far away (`distant_server`) sends all voxels once;
beside it each stored object is asked for after the one before, as a plain loop over chunks does. Needs the
extra `dev` (moto).
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench_pipeline import RESULTS, versions
from distant_server import distant_server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.buckets import Bucket, portal_zarr, s3_server, way_to
from tomocpt_stream import ingest, open_tomogram
from tomocpt_stream.cluster import local_cluster
from tomocpt_stream.phantom import write_mrc
from tomocpt_stream.remote import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.buckets import Way
    from tomocpt_stream.frame import Box
    from tomocpt_stream.tomogram import Tomogram

VOXEL_SIZE, COARSER = 10.012, 1.45
LATENCY, RATE = 0.05, 90.0  # s before an answer, MB/s of one connection


@dataclass(frozen=True)
class Place:
    """The tomogram in one layout: its key, the bytes of level 0, the edge of its chunks (0: a file)."""

    key: str
    stored: int
    chunk: int

    @property
    def name(self) -> str:
        """What the tables call it."""
        return f"zarr, chunks of {self.chunk}³" if self.chunk else "MRC"


@contextmanager
def places(shape: tuple[int, int, int]) -> Iterator[tuple[Way, str, list[Place]]]:
    """Serve the tomogram in every layout, behind a proxy and from afar."""
    voxels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with s3_server() as server, way_to(server) as way, tempfile.TemporaryDirectory() as temporary:
        bucket, folder, found = Bucket(server, "tomograms"), Path(temporary), []
        for chunk in (256, 64):
            name = f"chunks{chunk}.zarr"
            bucket.put_folder(portal_zarr(folder / name, voxels, VOXEL_SIZE, chunk), name)
            files = [path for path in (folder / name / "0").rglob("*") if path.is_file()]
            stored = sum(path.stat().st_size for path in files if path.name[:2] != ".z")
            found.append(Place(name, stored, chunk))
        write_mrc(folder / "file.mrc", voxels, VOXEL_SIZE)
        data = (folder / "file.mrc").read_bytes()
        bucket.put("file.mrc", data)
        found.append(Place("file.mrc", len(data), 0))
        with distant_server(folder, latency=LATENCY, rate=RATE) as far:
            yield way, far, found


def opened(way: Way, place: Place) -> Tomogram:
    """Open the tomogram through the proxy."""
    options = {"endpoint": way.url, "region": "us-west-2"}
    return open_tomogram(f"s3://tomograms/{place.key}", storage_options=options)


def everything(tomogram: Tomogram) -> Box:
    """Return the box of all voxels."""
    z, y, x = (slice(0, n) for n in tomogram.shape)
    return z, y, x


def fetched_rows(way: Way, found: list[Place]) -> Iterator[str]:
    """Yield the rows of the first table."""
    for place in found:
        for workers in (0, 2):
            with ExitStack() as held:
                client: Any = held.enter_context(local_cluster(workers)) if workers else None
                folder = held.enter_context(tempfile.TemporaryDirectory())
                way.reset()
                began = time.perf_counter()
                tomogram = opened(way, place)
                ingest(tomogram, f"{folder}/v", voxel_size=COARSER * VOXEL_SIZE, client=client)
                seconds = time.perf_counter() - began
            megabytes = way.bytes / 1e6
            yield (
                f"| {place.name} | {workers or 'none'} | {place.stored / 1e6:.1f} | {megabytes:.1f} | "
                f"{way.bytes / place.stored:.3f} | {len(way.asked)} | {way.most_at_once} | {seconds:.1f} |"
            )


def latency_rows(far: str, found: list[Place]) -> Iterator[str]:
    """Yield the rows of the second table."""
    for place in found:
        seconds = []
        for read in (_read_at_once, _read_in_turn):
            tomogram = open_tomogram(f"{far}/{place.key}")
            began = time.perf_counter()
            read(far, place, tomogram)
            seconds.append(time.perf_counter() - began)
        rates = [place.stored / 1e6 / spent for spent in seconds]
        yield (
            f"| {place.name} | {seconds[0]:.1f} | {rates[0]:.0f} | {seconds[1]:.1f} | {rates[1]:.0f} | "
            f"{seconds[1] / seconds[0]:.1f} |"
        )


def _read_at_once(far: str, place: Place, tomogram: Tomogram) -> None:
    del far, place
    tomogram.read(everything(tomogram))


def _read_in_turn(far: str, place: Place, tomogram: Tomogram) -> None:
    """Ask for each object after the one before; of a file, for a plane after a plane."""
    if not place.chunk:
        import obstore

        store = connect(far)
        planes, rows, columns = tomogram.shape
        size = rows * columns * 4
        for plane in range(planes):
            start = 1024 + plane * size
            obstore.get_range(store._store.store, place.key, start=start, length=size)
        return
    import zarr

    store = connect(f"{far}/{place.key}/0")
    with zarr.config.set({"async.concurrency": 1}):
        zarr.open_array(store, mode="r", zarr_format=2)[:]


def main() -> None:
    """Print one Markdown page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=[184, 630, 630], help="voxels z y x")
    parser.add_argument("--write", action="store_true", help="also write the page below benchmarks/results")
    parser.add_argument(
        "--hardware", default=f"{platform.machine()}-{os.cpu_count()}cpu", help="for the page's name"
    )
    asked = parser.parse_args()
    z, y, x = asked.shape
    page = ["# Tomograms on an object store", "", *versions("bench_sources.py", "obstore")]
    with places((z, y, x)) as (way, far, found):
        page += [
            "",
            "## What is fetched",
            "",
            f"{z} x {y} x {x} float32 voxels (z, y, x) onto a grid of {COARSER} times the voxel size, no",
            "latency; MB of level 0 as they are stored, MB of voxels that came, requests of every kind.",
            "",
            "| layout | workers | MB stored | MB fetched | ratio | requests | most at once | s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *fetched_rows(way, found),
            "",
            "## Every answer 50 ms late",
            "",
            "All voxels read once: requests under way together, and each after the one before (zarr with",
            f"one request at a time; of the file a plane at a time). Each connection brings {RATE:g} MB/s.",
            "What remains is decoding and the copy on the local disk.",
            "",
            "| layout | together s | MB/s | in turn s | MB/s | times faster |",
            "|---|---:|---:|---:|---:|---:|",
            *latency_rows(far, found),
        ]
    text = "\n".join(page) + "\n"
    print(text)
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"sources_{asked.hardware}_{dt.datetime.now(tz=dt.UTC):%Y%m}.md").write_text(text)


if __name__ == "__main__":
    main()
