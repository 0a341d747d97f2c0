"""Runs a model's code in a process that can do little (annotation/sandbox/program.py) and is ended with all that
it has started."""

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
UNCONFINED = 97
"""Its exit code where namespaces cannot be had."""
REPORT = 3
MOST_OUTPUT = 1 << 20
"""Bytes of stdout, stderr or reports, after which it is ended."""


@dataclass(frozen=True)
class Limits:
    """What code may take."""

    seconds: float
    """Of the clock."""
    memory_bytes: int
    """Of each process."""
    processes: int
    """At once, threads included."""
    file_bytes: int = 16 << 20
    """Of all its files, and as many of its shared memory."""
    namespaces: bool = True
    """Whether it is kept from the network, from other processes and from writing files; else only by its user's
    rights."""


@dataclass(frozen=True)
class Ran:
    """What has become of it."""

    code: int | None
    """Exit code, 128 + N where signal N has ended it; None: it took too long or said too much."""
    passed: tuple[int, ...]
    """Numbers of the tests that have passed."""
    failed: tuple[int, ...]
    """Numbers of those that have failed by an exception."""
    begun: int
    """How many have begun: all, unless the program has ended first."""
    stdout: str
    stderr: str
    seconds: float


class UnconfinedError(Exception):
    """Namespaces cannot be had on this machine."""


def run(code: str, limits: Limits, tests: Sequence[str] = (), stdin: str = "") -> Ran:
    """Execute code, and each of `tests` in what it has defined.

    Raises:
        UnconfinedError: `limits` ask for namespaces, and the kernel gives none.
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


def _run(task: bytes, folder: str, nonce: str, limits: Limits) -> Ran:
    read, write = os.pipe()
    started = time.monotonic()
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    # Its standard descriptors are pipes, and REPORT is the end of `read`; nothing else of ours is open in it.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _START, str(write), str(PROGRAM)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd="/", env=environment, pass_fds=[write], start_new_session=True,
    )  # fmt: skip
    os.close(write)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    said: dict[int, bytearray] = {one: bytearray() for one in (process.stdout.fileno(), process.stderr.fileno(), read)}
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(task)
            process.stdin.close()
        whole = _listen(process, said, started + limits.seconds)
    finally:
        _end(process)
        os.close(read)
    out, errors, reports = (bytes(text).decode(errors="replace") for text in said.values())
    for stream in (process.stdout, process.stderr):
        stream.close()
    if process.returncode == UNCONFINED and not reports:
        raise UnconfinedError(errors.strip())
    told = [line.split() for line in reports.splitlines() if line.startswith(f"{nonce} ")]
    begun, passed, failed = (
        tuple(int(number) for _, number, what in told if what == one) for one in ("begun", "passed", "failed")
    )
    code = process.returncode if whole else None
    return Ran(code, passed, failed, len(begun), out, errors, time.monotonic() - started)


_START = f"import os, runpy, sys; os.dup2(int(sys.argv[1]), {REPORT}); os.closerange({REPORT} + 1, 256); " + (
    "runpy.run_path(sys.argv[2], run_name='__main__')"
)


def _listen(process: "subprocess.Popen[bytes]", said: dict[int, bytearray], deadline: float) -> bool:
    """Read what it says until it ends; False where it takes too long or says too much."""
    with selectors.DefaultSelector() as selector:
        for descriptor in said:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or any(len(text) > MOST_OUTPUT for text in said.values()):
                return False
            for key, _ in selector.select(min(left, 0.1)):
                if part := os.read(key.fd, 1 << 16):
                    said[key.fd] += part
                else:
                    selector.unregister(key.fd)
            if process.poll() is not None:  # what it has started may hold the pipes
                for descriptor in said:
                    os.set_blocking(descriptor, False)
                    with contextlib.suppress(BlockingIOError):  # also where all was read
                        said[descriptor] += os.read(descriptor, MOST_OUTPUT)
                return True
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
        return True
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill it with its group. In namespaces of its own this ends all that it has started; else what has left the group
    is found among this process's children, whose parents have died."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while orphans := _children():
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
    """Become the parent of whatever the processes of this one leave behind (man 2 PR_SET_CHILD_SUBREAPER)."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(OSError):
        return [int(child) for child in path.read_text().split()]
    return []


@functools.cache
def lack_of_namespaces() -> str | None:
    """Why code cannot be confined here; None where it can."""
    try:
        ran = run("print(1)", Limits(20, 512 << 20, 4))
    except UnconfinedError as error:
        return str(error)
    return None if ran.stdout == "1\n" else f"the sandbox ended with {ran.code}: {ran.stderr[-300:]}"
