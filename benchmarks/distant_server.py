"""A web server that is far away: late answers, and so many bytes a second on each connection.

    python benchmarks/distant_server.py FOLDER --latency 0.05 --rate 90

Serves the files of a folder on loopback, whole and by ranges, from a process of its own, and prints its
address. A store on the network costs the reader time, not processor: here both sleep. One connection to S3
brings 85 to 90 MB/s at most (Amazon's own guidelines for performance), however many there are.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 1 << 18


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    folder: Path
    latency: float
    rate: float


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        time.sleep(self.server.latency)
        path = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        first, last = _range(self.headers.get("Range"), size)
        self.send_response(200 if "Range" not in self.headers else 206)
        self.send_header("Content-Length", str(last - first))
        self.send_header("Content-Range", f"bytes {first}-{last - 1}/{size}")
        self.send_header("ETag", f'"{size}"')
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        if body:
            self.send(path, first, last)

    def send(self, path: Path, first: int, last: int) -> None:
        """Send bytes of a file, no faster than the rate."""
        self.wfile.flush()
        began = time.perf_counter()
        with path.open("rb") as file:
            at = first
            while at < last:
                at += os.sendfile(self.connection.fileno(), file.fileno(), at, min(PIECE, last - at))
                early = began + (at - first) / self.server.rate - time.perf_counter()
                if early > 0:
                    time.sleep(early)


def _range(text: str | None, size: int) -> tuple[int, int]:
    """Return the first byte that is asked for and the one behind the last."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", text or "")
    if found is None:
        return 0, size
    if not found[1]:
        return max(0, size - int(found[2])), size
    return int(found[1]), min(size, int(found[2]) + 1) if found[2] else size


@contextmanager
def distant_server(folder: Path, *, latency: float, rate: float) -> Iterator[str]:
    """Serve a folder from another process; yield the address. `latency` in s, `rate` in MB/s."""
    words = [sys.executable, __file__, str(folder), "--latency", str(latency), "--rate", str(rate)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.05, help="s before each answer")
    parser.add_argument("--rate", type=float, default=90.0, help="MB/s of one connection")
    asked = parser.parse_args()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.folder, server.latency, server.rate = asked.folder, asked.latency, asked.rate * 1e6
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
