"""An S3 server on loopback, a way to it that is slow or breaks, and tomograms as the portal stores them."""

from __future__ import annotations

import http.client
import json
import logging
import re
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import boto3
import numpy as np
import zarr
from moto.server import ThreadedMotoServer
from numcodecs import Blosc
from zarr.storage import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

PORTAL_BUCKET = "cryoet-data-portal-public"
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"}


@dataclass
class Asked:
    """One request that came by: what for, and what was answered."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    signer: str = ""  # the id of the key that signed it


@dataclass
class Way:
    """The way to a server: every request is kept in `asked`, and may come late or to grief.

    `fault` gets method, path and how often that path was asked for before, and returns None or one of
    "503", "403", "truncate", "drop". What has a word of `private` in its path or its query is refused to
    all but the key of that word.
    """

    latency: float = 0.0
    fault: Callable[[str, str, int], str | None] = lambda *_: None
    private: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: int = 0

    def reset(self) -> None:
        """Forget what was asked, and go straight."""
        self.latency, self.fault, self.most_at_once = 0.0, (lambda *_: None), 0
        self.asked.clear()
        self.private.clear()

    def data(self) -> list[Asked]:
        """Return the requests for voxels that were answered with some."""
        meta = (".json", ".zarray", ".zattrs", ".zgroup")
        return [one for one in self.asked if one.status in (200, 206) and not one.path.endswith(meta)]

    @property
    def bytes(self) -> int:
        """Bytes of voxels that were sent."""
        return sum(one.sent for one in self.data() if one.method == "GET")


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, way: Way, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.way, self.target = way, urlsplit(server)

    def handle_error(self, *_: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):
            super().handle_one_request()

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, way = urlsplit(self.path).path, self.server.way
        with way.lock:
            before = sum(one.path == path for one in way.asked)
            signer = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
            asked = Asked(self.command, path, self.headers.get("Range"), 0, 0, signer[1] if signer else "")
            way.asked.append(asked)
            way.under_way += 1
            way.most_at_once = max(way.most_at_once, way.under_way)
        try:
            time.sleep(way.latency)
            fault = way.fault(self.command, path, before)
            owners = {key for word, key in way.private.items() if word in unquote(self.path)}
            fault = fault if owners <= {asked.signer} else "403"
            if fault == "drop":
                self.close_connection = True
            elif fault in ("503", "403"):
                asked.status = int(fault)
                self.send_response(asked.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.answer(asked, body, truncate=fault == "truncate")
        finally:
            with way.lock:
                way.under_way -= 1

    def answer(self, asked: Asked, body: bytes, *, truncate: bool) -> None:
        target = self.server.target
        with closing(http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)) as upstream:
            headers = {key: value for key, value in self.headers.items() if key.lower() not in HOP}
            upstream.request(self.command, self.path, body or None, headers)
            found = upstream.getresponse()
            data = found.read()
        asked.status = found.status
        self.send_response(found.status)
        for key, value in found.getheaders():
            if key.lower() not in HOP:
                self.send_header(key, value)
        length = found.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if truncate and len(data) > 1:
            data = data[: len(data) // 2]
            self.close_connection = True
        asked.sent = len(data)
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on


@contextmanager
def way_to(server: str) -> Iterator[Way]:
    """Serve a way to a server; its `url` takes the place of the server's."""
    way = Way()
    with _Proxy(way, server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        way.url = f"http://127.0.0.1:{proxy.server_port}"
        try:
            yield way
        finally:
            proxy.shutdown()
            thread.join()


class Bucket:
    """A bucket of a server: objects that everybody may read, unless they are private."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.name = name
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-west-2",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        self.client.create_bucket(
            Bucket=name, CreateBucketConfiguration={"LocationConstraint": "us-west-2"}, ACL="public-read"
        )

    def put(self, key: str, data: bytes, *, private: bool = False) -> None:
        """Store an object."""
        acl = "private" if private else "public-read"
        self.client.put_object(Bucket=self.name, Key=key, Body=data, ACL=acl)

    def put_folder(self, folder: Path, key: str) -> int:
        """Store all files of a folder; return the bytes of those that are no metadata."""
        total = 0
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
                total += 0 if path.name.startswith(".z") else path.stat().st_size
        return total

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", [])]


class S3(NamedTuple):
    """A bucket, and the way to its server."""

    bucket: Bucket
    way: Way

    def options(self, **more: Any) -> dict[str, Any]:
        """Return the storage options that lead there; failures are given up within seconds."""
        return {"endpoint": self.way.url, "region": "us-west-2", "retry_timeout": 2, "max_retries": 3, **more}

    def address(self, key: str) -> str:
        """Return the address of an object or a folder."""
        return f"s3://{self.bucket.name}/{key}"


@contextmanager
def s3_server() -> Iterator[str]:
    """Run an S3 server; its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def portal_zarr(
    folder: Path, voxels: npt.NDArray[np.float32], voxel_size: float, chunk: int = 256, levels: int = 3
) -> Path:
    """Write a tomogram as the portal does: OME-Zarr 0.4, format 2, means of 2 x 2 x 2, no consolidation."""
    group = zarr.create_group(LocalStore(folder), zarr_format=2)
    datasets = []
    for level in range(levels):
        array = group.create_array(
            str(level),
            shape=voxels.shape,
            chunks=(chunk,) * 3,
            dtype="float32",
            compressors=Blosc(cname="lz4", clevel=5, shuffle=1),
            chunk_key_encoding={"name": "v2", "separator": "/"},
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array[:] = voxels
        scale = [voxel_size * 2**level] * 3
        datasets.append(
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        )
        padded = np.pad(voxels, [(0, n % 2) for n in voxels.shape])
        z, y, x = (n // 2 for n in padded.shape)
        voxels = padded.reshape(z, 2, y, 2, x, 2).mean(axis=(1, 3, 5), dtype=np.float32)
    axes = [{"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"]
    multiscales = [{"version": "0.4", "name": "/", "axes": axes, "datasets": datasets}]
    (folder / ".zattrs").write_text(json.dumps({"multiscales": multiscales}))
    return folder
