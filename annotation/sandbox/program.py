"""Confines itself and executes a model's code: the program that annotation/sandbox/process.py starts by its path.

It reads one JSON object from stdin, drops its privileges, and forks; the child executes the code. It imports only the
standard library, and nothing of Ratchet, since the code sees the modules that are imported here.

It gives up the network, other processes, and writing to files (user, network, PID, IPC and mount namespaces; man 7
namespaces), the privileges of root, and limits its memory, CPU time, number of processes and size of files (man 2
setrlimit).
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import types
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
MOUNT_SETATTR = 442  # the number of the system call, the same on all architectures
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
SHARED_MEMORY = "/dev/shm"
"""Directory in which the C library creates semaphores, which multiprocessing needs."""
REPORT = 3
"""File descriptor on which it reports the results of tests."""
NO_NAMESPACES = 97
"""Exit code if namespaces are requested and the kernel does not grant them."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Confine this process, run the code, and exit with its exit code."""
    task = json.loads(sys.stdin.buffer.read())
    if os.geteuid() == 0:  # root is exempt from the limit on processes
        keep_standard_library()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if task["namespaces"]:
        try:
            enter_namespaces(task["folder"], task["file_bytes"])
        except OSError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(NO_NAMESPACES)
    drop_capabilities()
    os.chdir(task["folder"])
    first = os.fork()  # PID 1 of the namespace: when it exits, the kernel kills all other processes in it
    if first == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        child = os.fork()  # PID 1 would ignore fatal signals that the code sends to itself
        if child == 0:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            limit(task)
            run(task)
        exit_like(child)
    exit_like(first)


def exit_like(child: int) -> NoReturn:
    """Wait for a process, and exit with its exit code, or with 128 + N if signal N ended it."""
    os.close(REPORT)
    os.closerange(0, 2)
    _, status = os.waitpid(child, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def keep_standard_library() -> None:
    """Make the standard library importable through open descriptors, as it may lie in a directory that only root may
    enter."""
    found = {path: f"/proc/self/fd/{os.open(path, os.O_PATH)}" for path in sys.path if os.path.isdir(path)}
    for module in list(sys.modules.values()):  # packages that are already imported find submodules by `__path__`
        if hasattr(module, "__path__"):
            module.__path__ = [_below(place, found) for place in module.__path__]
    sys.path[:] = found.values()
    sys.path_importer_cache.clear()


def _below(place: str, folders: dict[str, str]) -> str:
    """A package's directory, relative to the descriptor of the innermost directory that contains it."""
    inner = max((path for path in folders if place.startswith(f"{path}/")), key=len, default=None)
    return place if inner is None else folders[inner] + place[len(inner) :]


def enter_namespaces(folder: str, size: int) -> None:
    """Move to new namespaces, in which only `folder` and /dev/shm are writable, as empty in-memory file systems.

    Raises:
        OSError: the kernel does not permit it.
    """
    uid, gid = os.getuid(), os.getgid()
    check_call(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    check_call(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount private")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    numbers = [ctypes.c_long(one) for one in (MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ctypes.sizeof(attributes))]
    call, here, how, length = numbers
    check_call(libc.syscall(call, here, b"/", how, ctypes.byref(attributes), length), "mount_setattr")
    options = f"size={size},mode=700".encode()
    for place in (folder, SHARED_MEMORY):
        if os.path.isdir(place):
            check_call(libc.mount(b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), f"mount {place}")


def drop_capabilities() -> None:
    """Drop the capabilities that a process has in a namespace that it created, with which it could undo the
    confinement (man 2 capset)."""
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    check_call(libc.capset(ctypes.byref(header), ctypes.byref(none)), "capset")


def check_call(result: int, name: str) -> None:
    """Raise OSError if a call of the C library failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def limit(task: dict[str, Any]) -> None:
    """Set the resource limits of the code."""
    limits = {
        resource.RLIMIT_CPU: task["cpu_seconds"],
        resource.RLIMIT_AS: task["memory_bytes"],
        resource.RLIMIT_FSIZE: task["file_bytes"],
        resource.RLIMIT_NPROC: task["processes"] + (2 if task["namespaces"] else count_user_threads()),
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def count_user_threads() -> int:
    """Number of this user's threads, which count towards the limit on processes if there is no user namespace."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count


def run(task: dict[str, Any]) -> None:
    """Execute the code, then the tests, and report for each test that it has begun, and that it passed or failed."""
    report, nonce = os.dup(REPORT), task["nonce"]
    os.set_inheritable(report, False)
    os.close(REPORT)
    given = os.memfd_create("stdin")
    os.write(given, task["stdin"].encode())
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.setrecursionlimit(10_000)
    code, tests, program = task["code"], task["tests"], types.ModuleType("__main__")
    sys.modules["__main__"] = program  # where pickle and dataclasses look up the code's definitions
    confined = vars(program)
    confined["__builtins__"] = __builtins__
    ended = 0

    def report_event(number: int, event: str) -> None:
        os.write(report, f"{nonce} {number} {event}\n".encode())

    try:
        exec(compile(code, "answer.py", "exec"), confined)
        for number, test in enumerate(tests):
            report_event(number, "begun")
            try:
                exec(compile(test, f"test {number}", "exec"), confined)
                report_event(number, "passed")
            except AssertionError as error:
                report_event(number, "failed")
                print(f"test {number} failed: {error}", file=sys.stderr)
            except Exception as error:
                report_event(number, "failed")
                print(f"test {number}: {type(error).__name__}: {error}", file=sys.stderr)
    except SystemExit as error:
        ended = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        ended = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(ended & 255)


if __name__ == "__main__":
    main()
