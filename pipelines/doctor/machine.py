"""Checks of this machine: file systems, loopback, limits."""

import contextlib
import fcntl
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from contracts.preflight import Finding, Level

NETWORK_TYPES = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "glusterfs", "afs", "9p", "fuse.")
"""Prefixes of network file system types in /proc/mounts; fuse. usually is one (sshfs, s3fs, gcsfuse)."""
LOCAL_LOCKS = ("nolock", "localflock", "local_lock=all", "local_lock=flock")
"""Mount options with which file locks are local to one machine."""
CLOCK_SKEW = 2.0
"""Seconds by which a file server's clock may differ without a warning."""
SHARED_MEMORY = 512 << 20
"""Bytes of shared memory below which there is a warning."""
OPEN_FILES = 1024
"""Limit of open files below which there is a warning."""


def nearest_existing(path: Path) -> Path:
    """The path, or its nearest existing parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def mount_of(path: Path, mounts: str) -> tuple[str, list[str]]:
    """Type and mount options of a path's file system, from the text of /proc/mounts."""
    found, length = ("unknown", [""]), -1
    for line in mounts.splitlines():
        _, place, kind, options, *_ = line.split()
        place = place.encode().decode("unicode_escape")  # a space is \040
        if path.is_relative_to(place) and len(place) >= length:  # the last mount at a place hides the others
            found, length = (kind, options.split(",")), len(place)
    return found


def check_file_system(name: str, place: Path) -> Iterator[Finding]:
    """Check that the file system of `place` supports what publication relies on: atomic renames, fsync, locks.

    The probes use a temporary directory there, which is always removed.
    """
    directory = nearest_existing(place)
    kind, options = "unknown", [""]
    with contextlib.suppress(OSError):
        kind, options = mount_of(directory.resolve(), Path("/proc/mounts").read_text())
    network = kind.startswith(NETWORK_TYPES)
    other = f"Put {name} on a local disk, or on a file system that can do it."
    failed = False
    with tempfile.TemporaryDirectory(prefix=".ratchet-doctor-", dir=directory) as scratch:
        for what, probe, level, fix in PROBES:
            try:
                problem = probe(Path(scratch))
            except OSError as error:
                problem = error.strerror or str(error)
            if problem:
                failed = True
                yield Finding(level, f"{name} ({directory}, {kind}): {what}: {problem}", fix or other)
    if locks := [option for option in options if option in LOCAL_LOCKS]:
        yield Finding(
            "warning",
            f"{name} ({directory}, {kind}) is mounted with {locks[0]}: a lock holds on this machine only",
            "Never drive one run from two machines at once, or mount it without this option.",
        )
    elif not failed:
        text = f"{name} ({directory}) is {kind}{', a network file system' if network else ''}"
        yield Finding("ok", f"{text}: renames, flushes and locks work")


def _directory_rename(scratch: Path) -> str:
    (scratch / "a").mkdir()
    (scratch / "a" / "file").write_text("content")
    os.rename(scratch / "a", scratch / "b")
    return "" if (scratch / "b" / "file").read_text() == "content" else "its files are gone"


def _file_replacement(scratch: Path) -> str:
    old, new = scratch / "old", scratch / "new"
    old.write_text("old")
    new.write_text("new")
    with old.open() as reader:
        os.replace(new, old)
        if old.read_text() != "new" or new.exists():
            return "the old file is still there"
        return "" if reader.read() == "old" else "open readers see the change"


def _flush(scratch: Path) -> str:
    (scratch / "flushed").write_text("content")
    for path in (scratch / "flushed", scratch):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return ""


def _lock(scratch: Path) -> str:
    program = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(7)"
    )
    with (scratch / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, "-I", "-S", "-c", program, str(scratch / "lock")]
        code = subprocess.run(command, capture_output=True, timeout=60, check=False).returncode
    return "" if code == 7 else "another process does not see it"


def _hard_link(scratch: Path) -> str:
    (scratch / "first").write_text("content")
    os.link(scratch / "first", scratch / "second")
    return ""


def _case(scratch: Path) -> str:
    (scratch / "Case").touch()
    return "Case and case are one file" if (scratch / "case").exists() else ""


def _clock(scratch: Path) -> str:
    before = time.time()
    (scratch / "stamp").touch()
    skew = (scratch / "stamp").stat().st_mtime - before
    return f"it is {skew:+.1f} s off this machine's" if abs(skew) > CLOCK_SKEW else ""


PROBES: tuple[tuple[str, Callable[[Path], str], Level, str | None], ...] = (
    ("renaming a directory", _directory_rename, "error", None),
    ("replacing a file", _file_replacement, "error", None),
    ("flushing", _flush, "error", None),
    ("locking", _lock, "error", None),
    (
        "hard links",
        _hard_link,
        "warning",
        "Nothing has to be done: `pipeline fork` copies files instead.",
    ),
    (
        "case of letters",
        _case,
        "warning",
        "Do not give runs or scorers names that differ only in case.",
    ),
    ("clock", _clock, "warning", "Synchronise the clocks of this machine and of the file server (NTP)."),
)
"""Each probe with its name, function (returns the problem or ""), level, and fix; fix None: another file system."""


def check_loopback(needed: str | None) -> Iterator[Finding]:
    """Check that loopback connections work; `needed` tells what needs them, if anything does."""
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            client.settimeout(5)
            client.connect(server.getsockname())
    except OSError as error:
        found = f"no process can listen on 127.0.0.1 and be reached there: {error.strerror or error}"
        use = f"{needed} needs it" if needed else "no stage of this run needs it"
        fix = "Bring the loopback interface up (`ip link set lo up`), or leave the sandbox that forbids it."
        yield Finding("error" if needed else "warning", f"{found}; {use}", fix)
    else:
        yield Finding("ok", "processes can listen on 127.0.0.1 and be reached there")


def check_limits(processes: int) -> Iterator[Finding]:
    """Check the limit of open files, and shared memory if a stage has several processes."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = files == resource.RLIM_INFINITY
    if files < OPEN_FILES and not unlimited:
        found = f"a process may open only {files} files"
        yield Finding("warning", found, f"Run `ulimit -n {4 * OPEN_FILES}` before `pipeline run`.")
    else:
        yield Finding("ok", f"a process may open {'any number of' if unlimited else files} files")
    if processes > 1:
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        found = f"{free >> 20} MiB of shared memory (/dev/shm) for stages of up to {processes} processes"
        if free < SHARED_MEMORY:
            fix = f"Provide {SHARED_MEMORY >> 20} MiB or more; in a container with --shm-size=8g or --ipc=host."
            yield Finding("warning", found, fix)
        else:
            yield Finding("ok", found)
