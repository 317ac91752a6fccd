"""A web server on loopback that serves a folder and fails at first, in all the ways that servers do."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, failures: dict[str, list[str]], lock: Any, **options: Any) -> None:
        self._failures, self._failing = failures, lock
        super().__init__(*arguments, **options)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        with self._failing:
            waiting = [kinds for part, kinds in self._failures.items() if part in self.path and kinds]
            kind = waiting[0].pop(0) if waiting else ""
        if kind == "503":
            self.send_error(503)
        elif kind == "cut short":
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif kind == "reset":
            self.close_connection = True
        else:
            if kind == "slow":
                time.sleep(0.5)
            super().do_GET()


@contextmanager
def flaky_server(folder: Path, failures: dict[str, list[str]]) -> Iterator[str]:
    """The address of a server of `folder`.

    `failures` holds for a part of an address how its first requests fail: "503", "cut short", "reset"
    or "slow". They are taken out as they happen.
    """
    handler = partial(_Handler, directory=str(folder), failures=failures, lock=threading.Lock())
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
