"""`pipeline view RUN`: serves the report over HTTP on this machine, updated as the run goes on.

It writes nothing, so it also works for another user's run, and for one in progress on another machine with the same
file system. Pages of other origins get no answers: requests must name the bound address in their Host header.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from contracts.errors import UserError
from contracts.points import METRICS
from pipelines.graph import Graph
from pipelines.insight.report.gather import gather
from pipelines.insight.report.page import render_page
from pipelines.insight.report.sample_cache import SampleCache
from pipelines.run.directory import RunDirectory
from pipelines.run.events import FILE
from pipelines.text import echo

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

HOST = "127.0.0.1"
PORT = 8710
FOLDER = "samples"
POLL_SECONDS = 2.0
"""Minimum interval between checks of the files."""
MAX_AGE_SECONDS = 30.0
"""Age at which the report is gathered again in any case: a stage that fails or waits records no event at once."""


class LiveReport:
    """The up-to-date page of a run. It is gathered again when the run's events or metrics have grown."""

    def __init__(self, open_run: Callable[[], tuple[RunDirectory, Graph]]) -> None:
        self._open = open_run
        self._run, self._graph = open_run()
        self._cache = SampleCache()
        self._lock = threading.Lock()
        self._seen: tuple[Any, ...] = ()
        self._polled = self._gathered = float("-inf")
        self._page = self._content = b""
        self.version = 0
        """Version of the page; it increases with every change."""

    def page(self) -> bytes:
        """The current page as HTML."""
        self.renew()
        return self._page

    def chunk(self, name: str) -> bytes | None:
        """A chunk of samples, as a script; None if there is no such chunk."""
        with self._lock, contextlib.suppress(KeyError):
            return f'ratchetChunk("{name}","{self._cache.chunk(name)}")\n'.encode()
        return None

    def renew(self) -> int:
        """Update the page if the run has changed. Returns its version."""
        with self._lock:
            now = time.monotonic()
            if now - self._polled > POLL_SECONDS:
                self._polled = now
                seen = tuple(_size(self._run.path / name) for name in (FILE, METRICS, "run.json"))
                if seen != self._seen or now - self._gathered > MAX_AGE_SECONDS:
                    self._gather(seen)
            return self.version

    def _gather(self, seen: tuple[Any, ...]) -> None:
        if self._seen and seen[-1] != self._seen[-1]:  # another command has continued the run, perhaps with more stages
            with contextlib.suppress(UserError):
                self._run, self._graph = self._open()
        report = gather(self._run, self._graph, self._cache)
        self._cache.prune(report.sets)
        made, report.made = report.made, 0.0
        content = msgspec.json.encode(report)
        if content != self._content:
            report.made = made
            self._content, self.version = content, self.version + 1
            self._page = render_page(report, self._cache, FOLDER, live=self.version)[0].encode()
        self._seen, self._gathered = seen, time.monotonic()


def _size(path: Path) -> int:
    """The size of a file; -1 if it cannot be read. Opening it makes a network file system report the current size."""
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except OSError:
        return -1


def make_server(live: LiveReport, port: int) -> "ThreadingHTTPServer":
    """A server of the page, bound to the loopback device; port 0 means any free one.

    Raises:
        UserError: the port is taken.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # imports ssl, which other commands do not need

    class Handler(BaseHTTPRequestHandler):
        """Answers with the page, its version, and chunks of samples."""

        server_version, sys_version = "Ratchet", ""
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            """Serve a connection until the client closes it."""
            with contextlib.suppress(ConnectionError):
                super().handle()

        def do_GET(self) -> None:
            """Answer one request."""
            address = f"{HOST}:{self.connection.getsockname()[1]}"
            if self.headers.get("Host") not in (address, address.replace(HOST, "localhost")):
                return self.answer(HTTPStatus.FORBIDDEN, "text/plain", b"ask for http://" + address.encode())
            path = self.path.partition("?")[0]
            if path == "/":
                return self.answer(HTTPStatus.OK, "text/html; charset=utf-8", live.page())
            if path == "/version":
                return self.answer(HTTPStatus.OK, "application/json", msgspec.json.encode(live.renew()))
            name = path.removeprefix(f"/{FOLDER}/").removesuffix(".js")
            if path == f"/{FOLDER}/{name}.js" and (chunk := live.chunk(name)) is not None:
                return self.answer(HTTPStatus.OK, "text/javascript; charset=utf-8", chunk)
            return self.answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")

        def answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            """Send an answer."""
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(content))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("Cross-Origin-Resource-Policy", "same-origin"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} of {HOST} cannot be used ({error}). Choose another one with --port.") from error


def view(console: Console, open_run: Callable[[], tuple[RunDirectory, Graph]], port: int | None) -> None:
    """Serve the report until interrupted."""
    live = LiveReport(open_run)
    if port is None:
        try:
            server = make_server(live, PORT)
        except UserError:  # probably another `pipeline view` has the port
            server = make_server(live, 0)
    else:
        server = make_server(live, port)
    bound = server.server_address[1]
    echo(
        console,
        f"http://{HOST}:{bound}/ (Ctrl-C ends it)",
        f"From another machine: ssh -L {bound}:{HOST}:{bound} {socket.gethostname()}",
    )
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
