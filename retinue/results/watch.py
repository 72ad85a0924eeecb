"""A page of running sweeps: an HTTP server on this machine that reads the runs again when the page asks."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from retinue.results.collection import Run, find_runs
from retinue.results.report import make_data, make_page
from retinue.runs.status import lock_owner

HOST = "127.0.0.1"
# Seconds for which what was read serves all pages that ask.
MAX_AGE = 1.0


class Feed:
    """The report's data as JSON, read again when it is older than `MAX_AGE` seconds.

    Args:
        read: returns what the page shows, as `make_data` does. A ValueError, such as that of a folder without runs,
            becomes the page's message.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]]):
        self._read, self._lock = read, threading.Lock()
        self._body, self._tag, self._read_at = b"", "", -float("inf")

    def get(self) -> tuple[bytes, str]:
        """Return the JSON and a tag, which changes with the runs."""
        with self._lock:
            if time.monotonic() - self._read_at > MAX_AGE:
                try:
                    data = dict(self._read())
                except ValueError as error:
                    data = {"message": str(error)}
                self._body = json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
                # The time of reading must not count as a change.
                unchanging = json.dumps(data | {"made": ""}, allow_nan=False).encode()
                self._tag = f'"{hashlib.sha256(unchanging).hexdigest()[:16]}"'
                self._read_at = time.monotonic()
            return self._body, self._tag


def find_live_runs(folder: Path) -> list[Run]:
    """Return all runs below a folder, those that a process holds with the status `running`.

    Raises:
        ValueError: The folder does not exist, or holds no run.
    """
    runs = find_runs(folder)
    for run in runs:
        if run.status == "stopped" and lock_owner(run.folder) is not None:
            run.status = "running"
    return runs


def make_server(read: Callable[[], Mapping[str, Any]], folder: Path, title: str, port: int) -> ThreadingHTTPServer:
    """Return a server of the page and of its data, bound to this machine only.

    Args:
        read: as in `Feed`.
        folder: the folder of the runs, which the page names.
        title: title and heading of the page.
        port: port of the server; 0 takes a free one.

    Raises:
        ValueError: the port cannot be used.
    """
    feed = Feed(read)
    page = make_page(make_data([], folder), title, live=True).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site whose name leads to this machine must not read the runs.
            if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                self._reply(HTTPStatus.FORBIDDEN)
            elif self.path == "/":
                self._reply(HTTPStatus.OK, page, "text/html")
            elif self.path == "/data.json":
                body, tag = feed.get()
                if self.headers.get("If-None-Match") == tag:
                    self._reply(HTTPStatus.NOT_MODIFIED, tag=tag)
                else:
                    self._reply(HTTPStatus.OK, body, "application/json", tag)
            else:
                self._reply(HTTPStatus.NOT_FOUND)

        def _reply(self, status: HTTPStatus, body: bytes = b"", type_: str = "text/plain", tag: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{type_}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing: the page asks every few seconds."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ValueError(f"port={port} cannot be used ({error.strerror}); port=0 takes a free one") from None
