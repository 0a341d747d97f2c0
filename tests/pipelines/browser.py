"""Drives a headless Chromium by its DevTools protocol, to test pages and the errors on their consoles."""

import base64
import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip
SECONDS = 200.0
INSTALL_SECONDS = 400.0


class NoBrowser(Exception):  # noqa: N818 - the message says how to install one
    """There is no browser on this machine."""


class Browser:
    """One page of one browser."""

    def __init__(self) -> None:
        command = _command() or _installed()
        if command is None:
            raise NoBrowser("there is no chromium on this machine. Debian: apt-get install -y chromium")
        self._profile = tempfile.mkdtemp(prefix="ratchet-browser-")
        self._process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        found = (re.search(r"ws://127\.0\.0\.1:(\d+)/", line) for line in self._process.stderr)
        port = next((int(match[1]) for match in found if match), None)
        if port is None:
            raise NoBrowser(f"{command} does not start")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=SECONDS) as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        self._connect(port, pages[0]["webSocketDebuggerUrl"].partition(str(port))[2])
        self._id = 0
        self._events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _connect(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self._socket.sendall("\r\n".join(lines).encode())
        self._stream = self._socket.makefile("rb")
        assert b"101" in self._stream.readline()
        while self._stream.readline().strip():
            pass

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol, and return its result."""
        self._id += 1
        content = json.dumps({"id": self._id, "method": method, "params": parameters}).encode()
        size, mask = len(content), os.urandom(4)
        head = bytes([0x81, 0x80 | min(size, 126)]) if size < 126 else struct.pack(">BBH", 0x81, 0xFE, size)
        if size > 0xFFFF:
            head = struct.pack(">BBQ", 0x81, 0xFF, size)
        self._socket.sendall(head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(content)))
        while (message := self._message()).get("id") != self._id:
            self._events.append(message)
        assert "error" not in message, message
        return message["result"]

    def _message(self) -> dict[str, Any]:
        content, last = b"", False
        while not last:
            first, size = self._stream.read(2)
            last = bool(first & 0x80)
            if size == 126:
                (size,) = struct.unpack(">H", self._stream.read(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self._stream.read(8))
            content += self._stream.read(size)
        return dict(json.loads(content))

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the page in pixels, and the preferred colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Open a page, and wait until it is marked as ready."""
        self._events.clear()
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait("document.documentElement.dataset.ready === 'yes'")

    def run(self, script: str) -> Any:
        """Run a script and return its awaited value."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = SECONDS) -> Any:
        """Wait until a script's value is truthy, and return it."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):  # the page is just being replaced
                if value := self.run(condition):
                    return value
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}; {self.complaints()}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """The exceptions, errors and warnings on the page's console."""
        self.run("1")
        found = []
        for event in self._events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(parameters["exceptionDetails"]))
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(parameters["args"]))
        return found

    def requests(self) -> list[str]:
        """The addresses that the page has requested."""
        self.run("1")
        return [
            event["params"]["request"]["url"]
            for event in self._events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def screenshot(self, file: Path) -> None:
        """Save a screenshot as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """Close the browser."""
        self._socket.close()
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)


def _command() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def _installed() -> str | None:
    """Install Debian's chromium if this process may, as scripts/dev-slurm.sh does with Slurm; one process at a time."""
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        return None
    with open(apt, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _command() is None:
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
                subprocess.run([apt, *words], env=quiet, check=False, capture_output=True, timeout=INSTALL_SECONDS)
    return _command()
