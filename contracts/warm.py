"""Forks stages from a warm process, which has imported their package's libraries already, because imports take seconds.

    python -m contracts.warm PACKAGE DESCRIPTOR [LIBRARY ...]

imports what `PACKAGE/preload.py` imports for stages that need these libraries, and forks a process for each request
on a Unix socket. The parent creates the socket and passes its descriptor, so that a request may be sent before the
imports are done, and a client that waits for an answer notices immediately if this process dies. A fork is equivalent
to `python -m PACKAGE ...`: its arguments, variables, directory and output are those of the request, and it contains no
results of other stages. The warm process does nothing but imports: it runs no thread and opens no device.

A stage that has published, and has opened something worth keeping (contracts/resident.py), does not exit: its process
waits for another stage with the same label, which then finds the engine or the model that it needs. At most
`MOST_WAITING` processes wait; they are ended when an incoming stage needs their memory or their device. A stage's
replicas are forks of the same process, with labels of their own (contracts/workers.py).

A request is one line of JSON (`ForkRequest`), sent with the descriptors of its stdout and its stderr. There are two
lines of answer: the process id and, at the end, the exit code, followed by "waits" if the process stays. A fork ends
with its connection and with the warm process, which exits when its stdin is closed and no stage runs any more; during
the imports, it is killed when its parent ends.
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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from contracts import entrypoint, resident
from contracts.processes import die_with_parent, group_exists, outlive_parent, wait_until
from contracts.stopping import SIGNALS, TERMINAL
from contracts.versions import source_version

POLL_SECONDS = 0.05
BEGIN_SECONDS = 5.0
"""How long a waiting process may take to answer a request before it counts as hung."""
END_SECONDS = 10.0
"""How long a request to free memory waits for the child processes of the ended ones to exit."""
CLEANUP_SECONDS = 60.0
"""Time after which remaining child processes of an ended one are killed."""
MOST_BYTES = 1 << 20
MOST_WAITING = 4
"""Maximum number of waiting processes; the replicas of a stage count as one."""
REPLICA = "#"
"""Separates the label of a stage from the number of a replica."""
READY = ".ready"
"""Suffix, after the socket's name, of the file that exists when the imports are done."""
REFUSED = b"refused\n"
RELEASED = b"released\n"
WAITS = b"waits\n"
BEGUN = b"begun\n"


class ForkRequest(msgspec.Struct):
    """A request to run a stage; without arguments, a request to end all waiting processes with a different label."""

    argv: list[str]
    """The arguments after `python`: -m MODULE ..."""
    environment: dict[str, str]
    directory: str
    source: str
    """The expected version of the package's source."""
    label: str = ""
    """Stages with the same label can use what one of them has opened; if empty, the stage gets a new process."""


@dataclass(eq=False)
class _Child:
    pid: int
    label: str
    channel: socket.socket | None
    """Connection by which it says that it waits, and receives its next stage; None without a label."""
    client: socket.socket | None
    """Connection to the client that requested its stage; None while it waits."""
    end: int | None
    """A pidfd, which becomes readable when it ends; None if the system has none."""

    def ends(self) -> Iterator["socket.socket | int"]:
        """The sockets and descriptors to watch for events of this process."""
        return (end for end in (self.client, self.channel, self.end) if end is not None)


class _Server:
    def __init__(self, package: str, descriptor: int, libraries: Sequence[str]) -> None:
        die_with_parent()
        self.socket = socket.socket(fileno=descriptor)
        self.socket.set_inheritable(False)
        self.source = source_version(package)  # before any of it is imported
        gc.disable()
        # A library that asks for GPUs while it is imported must not open one: a fork could not open it again.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        importlib.import_module(f"{package}.preload").preload(libraries)
        gc.collect()
        gc.freeze()  # keeps the memory of the imports shared with the forks
        gc.enable()
        outlive_parent()  # from now on, the end of stdin signals the end of the parent
        # A scheduler sends its signals to every process: the stages react, and need this process until they end.
        self.signals = {number: signal.signal(number, signal.SIG_IGN) for number in (*SIGNALS, *TERMINAL)}
        with contextlib.suppress(OSError):  # the parent has ended
            Path(f"{self.socket.getsockname()}{READY}").touch()
        self.children: list[_Child] = []
        self.ending: dict[int, float] = {}
        """Process groups that were ended, with the time at which their remaining processes are killed."""
        self.leaving = False

    def serve(self) -> tuple[ForkRequest, socket.socket | None]:
        """Answer requests; returns only in a forked process, with its request and its channel."""
        while True:
            ends = [end for child in self.children for end in child.ends()]
            doors = [] if self.leaving else [self.socket, sys.stdin]
            ready, _, _ = select.select([*doors, *ends], [], [], POLL_SECONDS)
            self.reap()
            if sys.stdin in ready:
                self.leave()
            for child in list(self.children):
                if child not in self.children:  # it was ended to make room for another one
                    continue
                if child.client is not None:
                    if child.client in ready and _is_closed(child.client):  # the client is gone
                        _kill(child.pid)
                    if child.channel in ready and _is_waiting(child.channel):
                        self.park(child)
                ended, status = os.waitpid(child.pid, os.WNOHANG)
                if ended:
                    self.forget(child, status)
            if self.leaving and not self.children and not self.ending:
                os._exit(0)
            if self.socket in ready and not self.leaving and (forked := self.answer()) is not None:
                return forked

    def park(self, child: _Child) -> None:
        """Let a child that has finished its stage wait; if too many wait, end those that have waited longest."""
        assert child.client is not None
        waiting = [other for other in self.children if other.client is None]
        groups = list(dict.fromkeys(_group(other) for other in waiting if _group(other) != _group(child)))
        for other in waiting:
            if _group(other) in groups[: max(0, len(groups) + 1 - MOST_WAITING)]:
                self.end(other)
        _answer(child.client, b"0 " + WAITS)
        child.client.close()
        child.client = None
        self.children.remove(child)  # move it to the end: waiting children are in the order in which they began to wait
        self.children.append(child)

    def forget(self, child: _Child, status: int) -> None:
        if child.client is not None:
            _answer(child.client, f"{os.waitstatus_to_exitcode(status)}\n".encode())
            child.client.close()
        if child.channel is not None:
            child.channel.close()
        if child.end is not None:
            os.close(child.end)
        self.children.remove(child)

    def end(self, child: _Child) -> None:
        """Kill a child; its own child processes get time to clean up, since an engine's workers free shared memory."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        self.forget(child, status)
        self.ending[child.pid] = time.monotonic() + CLEANUP_SECONDS

    def reap(self) -> bool:
        """Kill remaining processes of ended groups whose time is over; return whether none are left."""
        for group, deadline in list(self.ending.items()):
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            if not group_exists(group):
                del self.ending[group]
        return not self.ending

    def answer(self) -> tuple[ForkRequest, socket.socket | None] | None:
        """Answer one request; returns None, except in the forked process, which gets its request and its channel."""
        connection, _ = self.socket.accept()
        request, outputs = _received(connection)
        if request is not None and _is_closed(connection):  # the client no longer waits
            request = None
        if request is not None and not request.argv:
            self.release(request.label)
            _answer(connection, RELEASED)
        elif request is None or request.source != self.source:  # the source has changed since it was imported
            _answer(connection, REFUSED)
        elif self.hand_over(request, connection, outputs):
            _close(outputs)
            return None
        else:
            return self.fork(request, connection, outputs)
        connection.close()
        _close(outputs)
        return None

    def hand_over(self, request: ForkRequest, connection: socket.socket, outputs: list[int]) -> bool:
        """Pass a stage to a process that waits with the same label; return whether there was one."""
        waiting = (child for child in self.children if child.client is None and child.label == request.label)
        child = next(waiting, None) if request.label else None
        if child is None or child.channel is None:
            return False
        answer = b""
        with contextlib.suppress(OSError):
            child.channel.settimeout(BEGIN_SECONDS)
            socket.send_fds(child.channel, [msgspec.json.encode(request) + b"\n"], outputs)
            answer = child.channel.recv(len(BEGUN))
        if answer != BEGUN:  # it has died, or hangs
            self.end(child)
            return False
        child.client = connection
        _answer(connection, f"{child.pid}\n".encode())
        return True

    def fork(
        self, request: ForkRequest, connection: socket.socket, outputs: list[int]
    ) -> tuple[ForkRequest, socket.socket | None] | None:
        parent = os.getpid()
        ours, theirs = socket.socketpair() if request.label else (None, None)
        pid = os.fork()
        if pid:
            _close(outputs)
            if theirs is not None:
                theirs.close()
            end = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
            self.children.append(_Child(pid, request.label, ours, connection, end))
            return None
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        os.setsid()
        die_with_parent(parent)
        _become(request, outputs)
        _answer(connection, f"{os.getpid()}\n".encode())
        for child in self.children:
            for other in child.ends():
                os.close(other if isinstance(other, int) else other.detach())
        for open_socket in filter(None, (self.socket, connection, ours)):
            open_socket.close()
        return request, theirs

    def release(self, keep: str = "") -> None:
        """End the waiting processes, except those with the label `keep`."""
        for child in list(self.children):
            if child.client is None and not (keep and child.label.partition(REPLICA)[0] == keep):
                self.end(child)
        wait_until(self.reap, END_SECONDS)

    def leave(self) -> None:
        """Exit once the running stages have ended, because the parent is gone; their supervisors end them in time."""
        self.leaving = True
        self.release()


def _group(child: _Child) -> tuple[str, int]:
    """An id that a child shares with the other replicas of its stage, and with no other child."""
    label, replica, _ = child.label.partition(REPLICA)
    return (label, 0) if replica else (label, child.pid)


def _is_waiting(channel: socket.socket | None) -> bool:
    try:
        return channel is not None and channel.recv(len(WAITS)) == WAITS
    except OSError:
        return False


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _received(connection: socket.socket) -> tuple[ForkRequest | None, list[int]]:
    """Receive a request and the descriptors of its outputs; None if the request is invalid."""
    connection.settimeout(5.0)
    try:
        return _read(connection)
    except (OSError, ValueError):
        return None, []


def _read(connection: socket.socket) -> tuple[ForkRequest, list[int]]:
    content, outputs, _, _ = socket.recv_fds(connection, MOST_BYTES, 2)
    while content and not content.endswith(b"\n"):
        more = connection.recv(MOST_BYTES)
        content += more or b"\n"
    connection.settimeout(None)
    request = msgspec.json.decode(content, type=ForkRequest)
    if len(outputs) != (2 if request.argv else 0):
        raise ValueError(f"{len(outputs)} descriptors")
    return request, outputs


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _become(request: ForkRequest, outputs: list[int]) -> None:
    """Give this process the arguments, environment, directory and streams that a new one would have."""
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((null, *outputs)):
        os.dup2(source, target)
    _close([null, *outputs])
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.directory)
    sys.argv = ["-m", *request.argv[request.argv.index("-m") + 2 :]]
    sys.orig_argv = [sys.executable, *request.argv]


def _answer(connection: socket.socket, line: bytes) -> None:
    with contextlib.suppress(OSError):  # the client is gone
        connection.sendall(line)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _run(request: ForkRequest) -> int | str | None:
    """Run a stage as its package's main module; return its exit code."""
    try:
        module = request.argv[request.argv.index("-m") + 1]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    return 0


def _next(channel: socket.socket) -> ForkRequest:
    """Wait for another stage; exit if the connection is closed."""
    channel.sendall(WAITS)
    try:
        request, outputs = _read(channel)
    except (OSError, ValueError):
        os._exit(0)
    channel.sendall(BEGUN)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the previous stage ignored it when it ended
    _become(request, outputs)
    return request


if __name__ == "__main__":
    asked, the_channel = _Server(sys.argv[1], int(sys.argv[2]), sys.argv[3:]).serve()
    if the_channel is not None:
        resident.allow()
        entrypoint.runs_many_stages = True
    while (ended_with := _run(asked)) in (0, None) and the_channel is not None and resident.any_held():
        asked = _next(the_channel)
    sys.exit(ended_with)
