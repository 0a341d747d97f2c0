"""Runs fake stages (pretend.py) and jobs of the fake cluster in forks of one process that has imported their modules.

Importing takes most of their time. `warm_command` returns an equivalent of a command: a small client process, with the
command's variables, process group and signals, that requests a fork, passes signals on to it, and ends as it ends. If
the client is killed, so is the fork. Where PYTHONPATH differs from that of the tests, and once these have ended, the
client executes the command itself.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import inspect
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contracts.config import Section
from contracts.declaration import stages_of
from contracts.processes import die_with_parent

MODULES = ("pretend", "pipelines.job", "pipelines.execution.executors.slurm.detached", "submitit.core.submission")
PACKAGES = ("annotation", "contracts", "embedded", "generation", "training")


def request_fork(path: str, command: list[str]) -> None:
    """Run a command in a fork of the process that listens at `path`, and end as it ends.

    Every fake stage runs this in a process of its own, so it imports next to nothing.
    """
    import _signal
    import _socket

    numbers = (_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM, _signal.SIGUSR1, _signal.SIGUSR2)
    old = _signal.pthread_sigmask(_signal.SIG_BLOCK, numbers)
    line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    request = "\0".join([os.getcwd(), str(len(command)), *command, *variables]).encode(errors="surrogateescape")
    outputs = b"".join(number.to_bytes(4, sys.byteorder) for number in (1, 2))
    try:
        line.connect(path)
        line.sendmsg([b"%d\n" % len(request)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, outputs)])
        line.sendall(request)
        first, _, second = line.recv(32).partition(b"\n")
        pid = int(first)
    except (OSError, ValueError):  # it has ended, or refuses
        _signal.pthread_sigmask(_signal.SIG_SETMASK, old)
        os.execv(command[0], command)

    def pass_on(number: int, frame: object) -> None:
        try:  # noqa: SIM105 - without contextlib
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in numbers:
        _signal.signal(number, pass_on)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, old)
    code = int(second or line.recv(32) or -_signal.SIGKILL)
    if code < 0:
        if -code != _signal.SIGKILL:
            _signal.signal(-code, _signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


CLIENT = f"import os, sys\n\n{inspect.getsource(request_fork)}\nrequest_fork(sys.argv[1], sys.argv[2:])\n"


@functools.cache
def _server() -> Path:
    """Start the process that forks, which ends with this one, and return the folder with its socket and the client."""
    folder = Path(tempfile.mkdtemp(prefix="warm-jobs-"))
    (folder / "client.py").write_text(CLIENT)
    command = [sys.executable, "-u", __file__, str(folder / "socket")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    _servers.append(process)
    return folder


_servers: list["subprocess.Popen[bytes]"] = []


def warm_command(command: list[str]) -> list[str]:
    """A command that is equivalent to `command`: of pretend.py, or `python -P -u -m MODULE ARGUMENT`."""
    folder = _server()
    return [sys.executable, "-IS", str(folder / "client.py"), str(folder / "socket"), *command]


@dataclass(frozen=True)
class Request:
    """A command to run, and where."""

    directory: str
    command: list[str]
    environment: dict[str, str]
    outputs: list[int]

    @classmethod
    def read(cls, line: socket.socket) -> "Request":
        """Receive a request sent by `request_fork`."""
        said, outputs, _, _ = socket.recv_fds(line, 1 << 20, 2)
        head, _, content = said.partition(b"\n")
        while len(content) < int(head):
            content += line.recv(1 << 20) or b"\0" * int(head)
        directory, count, *words = content.decode(errors="surrogateescape").split("\0")
        variables = dict(item.split("=", 1) for item in words[int(count) :])
        return cls(directory, words[: int(count)], variables, outputs)

    def become(self, client: socket.socket) -> None:
        """Give this process what a new one would have. From now on, it is killed when the client ends."""
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in enumerate((null, *self.outputs)):
            os.dup2(source, target)
        for number in (null, *self.outputs):
            os.close(number)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        client.sendall(b"%d\n" % os.getpid())
        end = client.detach()  # stays open; the kernel sends the signal before anyone can learn of the client's end
        fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([end], [], [], 0)[0]:  # it has ended already
            os._exit(1)

    def run(self) -> None:
        """Run the command's program in this process."""
        program = self.command[1:]
        if "-m" in program:
            _, module, *arguments = program[program.index("-m") :]
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            importlib.import_module("pretend").run_stage()


@dataclass(eq=False)
class Fork:
    """A fork, and the client that waits for it."""

    pid: int
    end: int
    """A pidfd, which becomes readable when it ends."""
    client: socket.socket


def serve(path: str) -> Request:
    """Fork a process for each request until standard input ends. Returns only in the forks."""
    own = os.environ.get("PYTHONPATH")
    forks: set[Fork] = set()
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    os._exit(0)
                if key.data is not None:
                    end_fork(key.data, forks, selector)
                    continue
                client, _ = listener.accept()
                request = Request.read(client)
                if request.environment.get("PYTHONPATH") != own:
                    client.close()
                    continue
                parent, pid = os.getpid(), os.fork()
                if pid == 0:
                    os.setsid()
                    die_with_parent(parent)
                    for other in forks:
                        os.close(other.end)
                        other.client.close()
                    request.become(client)
                    return request
                for number in request.outputs:
                    os.close(number)
                fork = Fork(pid, os.pidfd_open(pid), client)
                forks.add(fork)
                selector.register(fork.end, selectors.EVENT_READ, fork)


def end_fork(fork: Fork, forks: set[Fork], selector: selectors.BaseSelector) -> None:
    """Tell the client of a fork how it has ended."""
    code = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
    with contextlib.suppress(OSError):
        fork.client.sendall(b"%d\n" % code)
    selector.unregister(fork.end)
    os.close(fork.end)
    fork.client.close()
    forks.remove(fork)


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    """All imported classes of configs."""
    for section in base.__subclasses__():
        yield section
        yield from sections(section)


if __name__ == "__main__":
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    for name in PACKAGES:
        stages_of(name)
    for each in sections():
        each.model_rebuild()  # builds its validator, which a process does otherwise when it first needs it
    gc.freeze()
    gc.enable()
    try:
        serve(sys.argv[1]).run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    else:
        code = 0
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # Python's own end would touch, and so copy, most of the memory that the forks share
