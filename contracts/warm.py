"""Processes that have imported a package's libraries, from which its stages are forked: importing them takes seconds.

    python -m contracts.warm PACKAGE SOCKET

imports what `PACKAGE/preload.py` imports, listens on a Unix socket, and forks a process for each request, which then is
`python -m PACKAGE ...` in every respect: its arguments, variables, directory and output are those of the request, and
nothing that another stage has computed is in it. Nothing is done here but imports: no thread runs, no device is opened.

A request is one line of JSON (`ForkRequest`) with the descriptor of the log; the answers are two lines: the process id
and, in the end, the exit code. The fork ends with its connection and with this process, which ends with its stdin.
"""

import contextlib
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import msgspec

from contracts.processes import die_with_parent
from contracts.versions import source_version

POLL_SECONDS = 0.05
LARGEST = 1 << 20
REFUSED = b"refused\n"


class ForkRequest(msgspec.Struct):
    """A stage to be run."""

    argv: list[str]
    """After `python`: -m PACKAGE ..."""
    environment: dict[str, str]
    directory: str
    source: str
    """Version of the package's source that is wanted."""


def serve(package: str, path: Path) -> ForkRequest:
    """Answer requests; returns in each process that is forked, with what it is to do."""
    source = source_version(package)  # before anything of it is imported
    importlib.import_module(f"{package}.preload").preload()
    gc.collect()
    gc.freeze()  # what is there stays shared with the processes that are forked
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    scratch = path.with_name(f"{path.name}.new")
    server.bind(str(scratch))
    server.listen()
    os.rename(scratch, path)  # who sees it can connect
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([server, sys.stdin, *children.values()], [], [], POLL_SECONDS)
        if sys.stdin in ready:
            _leave(children)
        for pid, connection in list(children.items()):
            if connection in ready and not connection.recv(1):  # whoever has asked is gone
                _kill(pid)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _answer(connection, f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()
                del children[pid]
        if server in ready:
            connection, _ = server.accept()
            request, log = _received(connection)
            if request is None or request.source != source:  # the source has changed since: it must be imported anew
                _answer(connection, REFUSED)
                connection.close()
                continue
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                _become(request, log, parent)
                _answer(connection, f"{os.getpid()}\n".encode())
                for open_socket in (server, connection, *children.values()):
                    open_socket.close()
                return request
            os.close(log)
            children[pid] = connection


def _received(connection: socket.socket) -> tuple[ForkRequest | None, int]:
    connection.settimeout(5.0)
    try:
        content, descriptors, _, _ = socket.recv_fds(connection, LARGEST, 1)
        while content and not content.endswith(b"\n"):
            more = connection.recv(LARGEST)
            content += more or b"\n"
        connection.settimeout(None)
        return msgspec.json.decode(content, type=ForkRequest), descriptors[0]
    except (OSError, ValueError, IndexError):
        return None, -1


def _become(request: ForkRequest, log: int, parent: int) -> None:
    """Make this fork what a new process would be."""
    os.setsid()
    die_with_parent(parent)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.close(null)
    os.close(log)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.directory)
    sys.argv = ["-m", *request.argv[2:]]
    sys.orig_argv = [sys.executable, *request.argv]


def _answer(connection: socket.socket, line: bytes) -> None:
    with contextlib.suppress(OSError):  # whoever has asked is gone
        connection.sendall(line)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _leave(children: Mapping[int, socket.socket]) -> NoReturn:
    for pid in children:
        _kill(pid)
    os._exit(0)


if __name__ == "__main__":
    asked = serve(sys.argv[1], Path(sys.argv[2]))
    runpy.run_module(asked.argv[1], run_name="__main__", alter_sys=True)
