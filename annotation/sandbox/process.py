"""Runs a model's code in a confined process (annotation/sandbox/program.py), and kills it with all its descendants."""

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("program.py")
NO_NAMESPACES = 97
"""Exit code of the program if the kernel does not grant namespaces."""
REPORT = 3
MAX_OUTPUT = 1 << 20
"""Maximum bytes of stdout, of stderr or of reports; a program that writes more is killed."""


@dataclass(frozen=True)
class Limits:
    """Resource limits for a program."""

    seconds: float
    """Wall-clock time."""
    memory_bytes: int
    """Memory of each process."""
    processes: int
    """Maximum number of processes and threads at a time."""
    file_bytes: int = 16 << 20
    """Total size of its files; the same limit holds for its shared memory."""
    namespaces: bool = True
    """Whether namespaces keep it from the network, from other processes and from writing files. If not, only its user's
    permissions do."""


@dataclass(frozen=True)
class ProgramResult:
    """The result of running a program."""

    code: int | None
    """Exit code, 128 + N after signal N; None: it exceeded the time or output limit."""
    passed: tuple[int, ...]
    """Numbers of the tests that passed."""
    failed: tuple[int, ...]
    """Numbers of the tests that raised an exception."""
    begun: int
    """How many tests began: all, unless the program ended before."""
    stdout: str
    stderr: str
    seconds: float


class NamespacesError(Exception):
    """The kernel does not grant namespaces on this machine."""


def run(code: str, limits: Limits, tests: Sequence[str] = (), stdin: str = "") -> ProgramResult:
    """Execute code, then each of `tests` in the code's global namespace.

    Raises:
        NamespacesError: `limits` ask for namespaces, and the kernel does not grant them.
    """
    folder = tempfile.mkdtemp(prefix="ratchet-code-")
    nonce = secrets.token_hex(16)
    try:
        os.chmod(folder, 0o777 if os.geteuid() == 0 else 0o700)
        task = {
            "code": code, "tests": list(tests), "stdin": stdin, "nonce": nonce, "folder": folder,
            "cpu_seconds": int(limits.seconds) + 1, "memory_bytes": limits.memory_bytes,
            "processes": limits.processes, "file_bytes": limits.file_bytes, "namespaces": limits.namespaces,
        }  # fmt: skip
        return _run(json.dumps(task).encode(), folder, nonce, limits)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(task: bytes, folder: str, nonce: str, limits: Limits) -> ProgramResult:
    others = set(_children())
    read, write = os.pipe()
    started = time.monotonic()
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    # The process inherits only its standard streams, which are pipes, and REPORT, the write end of the report pipe.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _START, str(write), str(PROGRAM)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd="/", env=environment, pass_fds=[write], start_new_session=True,
    )  # fmt: skip
    os.close(write)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output: dict[int, bytearray] = {
        one: bytearray() for one in (process.stdout.fileno(), process.stderr.fileno(), read)
    }
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(task)
            process.stdin.close()
        whole = _listen(process, output, started + limits.seconds)
    finally:
        _end(process, others)
        os.close(read)
    out, errors, reports = (bytes(text).decode(errors="replace") for text in output.values())
    for stream in (process.stdout, process.stderr):
        stream.close()
    if process.returncode == NO_NAMESPACES and not reports:
        raise NamespacesError(errors.strip())
    lines = [line.split() for line in reports.splitlines() if line.startswith(f"{nonce} ")]
    begun, passed, failed = (
        tuple(int(number) for _, number, event in lines if event == one) for one in ("begun", "passed", "failed")
    )
    code = process.returncode if whole else None
    return ProgramResult(code, passed, failed, len(begun), out, errors, time.monotonic() - started)


_START = f"import os, runpy, sys; os.dup2(int(sys.argv[1]), {REPORT}); os.closerange({REPORT} + 1, 256); " + (
    "runpy.run_path(sys.argv[2], run_name='__main__')"
)


def _listen(process: "subprocess.Popen[bytes]", output: dict[int, bytearray], deadline: float) -> bool:
    """Read its output until it ends; False if it exceeds the time or output limit."""
    with selectors.DefaultSelector() as selector:
        for descriptor in output:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or any(len(text) > MAX_OUTPUT for text in output.values()):
                return False
            for key, _ in selector.select(min(left, 0.1)):
                if part := os.read(key.fd, 1 << 16):
                    output[key.fd] += part
                else:
                    selector.unregister(key.fd)
            if process.poll() is not None:  # its descendants may still hold the pipes open
                for descriptor in output:
                    os.set_blocking(descriptor, False)
                    with contextlib.suppress(BlockingIOError):  # nothing is left to read
                        output[descriptor] += os.read(descriptor, MAX_OUTPUT)
                return True
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
        return True
    return False


def _end(process: "subprocess.Popen[bytes]", others: set[int]) -> None:
    """Kill its process group. In its own PID namespace this ends all descendants. Without one, descendants that left
    the group become children of this process when their parents die (`adopt_orphans`), and are killed here.

    Args:
        others: children that this process had before, which are left alone.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while orphans := [child for child in _children() if child not in others]:
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(orphan, os.WNOHANG)
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process (man 2 PR_SET_CHILD_SUBREAPER)."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(OSError):
        return [int(child) for child in path.read_text().split()]
    return []


@functools.cache
def namespaces_error() -> str | None:
    """Why code cannot be confined by namespaces on this machine; None if it can."""
    try:
        ran = run("print(1)", Limits(20, 512 << 20, 4))
    except NamespacesError as error:
        return str(error)
    return None if ran.stdout == "1\n" else f"the sandbox ended with {ran.code}: {ran.stderr[-300:]}"
