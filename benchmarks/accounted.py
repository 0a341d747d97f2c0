"""Runs the command `pipeline` and records where its CPU time went; used by benchmarks/overhead.py.

    python benchmarks/accounted.py RECORD ARGUMENTS OF pipeline ...

The CPU time of every process and its descendants comes from the kernel when the process ends (wait4), so it is not
sampled and does not depend on other load. In the driver, the time of each listener is measured separately.
"""

import contextlib
import ctypes
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPENT: dict[int, float] = {}
"""CPU seconds of ended processes with their descendants, by process id."""
NAMES: dict[int, str] = {}
"""Commands by process id; the kernel's name for processes that this one did not start."""
LISTENERS: dict[str, float] = {}
_SUBREAPER = 36
READER_PROCESSES = ("wandb-core", "gpu_stats")
"""The kernel's names of processes that readers start and do not wait for."""


@dataclass(frozen=True)
class Parts:
    """The CPU seconds of a run."""

    watching: dict[str, float]
    """The time of everything that watches or publishes the run: readers by their logs, checks of hooks, and listeners
    in the driver."""
    all: float

    @property
    def watched(self) -> float:
        """The sum of `watching`."""
        return sum(self.watching.values())

    @property
    def share(self) -> float:
        """The share of `watched` in the total."""
        return self.watched / self.all


def parts_of(record: dict[str, Any]) -> Parts:
    """Summarize a record."""
    found: Counter[str] = Counter()
    for name, spent in record["processes"]:
        if name.startswith("reader "):
            found[name] += spent
        elif "contracts.callable_check" in name:
            found["checks of functions"] += spent
        elif name in READER_PROCESSES:
            found[f"left by a reader: {name}"] += spent
    for module, spent in record["listeners"].items():
        found[f"in the driver: {module.rpartition('.')[2]}"] += spent
    return Parts(dict(found), record["driver"] + record["children"])


def wait(pid: int, options: int) -> tuple[int, int]:
    """Replace `os.waitpid`, and record the CPU time of the process."""
    with contextlib.suppress(ChildProcessError):  # wait4 below raises it again
        kind = os.P_PID if pid > 0 else os.P_ALL
        ended = os.waitid(kind, max(pid, 0), os.WEXITED | os.WNOWAIT | (options & os.WNOHANG))
        if ended is not None:
            pid = ended.si_pid
            NAMES.setdefault(pid, Path(f"/proc/{pid}/comm").read_text().strip())
    found, status, used = os.wait4(pid, options)
    if found:
        SPENT[found] = used.ru_utime + used.ru_stime
    return found, status


def watch() -> None:
    """Record the processes that this process starts, and the time of its listeners."""
    assert "subprocess" not in sys.modules, "subprocess has already bound os.waitpid"
    os.waitpid = wait
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # orphaned descendants become children of this process
    import subprocess

    start = subprocess.Popen.__init__

    def named_start(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
        start(self, command, *arguments, **options)
        NAMES[self.pid] = " ".join(map(str, command[1:] if isinstance(command, list | tuple) else [command]))

    subprocess.Popen.__init__ = named_start  # type: ignore[method-assign]

    from pipelines.execution.listeners import Broadcast
    from pipelines.insight.readers import ReaderProcess

    open_reader = ReaderProcess.__init__

    def named_reader(self: Any, command: Any, environment: Any, first_line: Any, log: Path) -> None:
        open_reader(self, command, environment, first_line, log)
        NAMES[self._process.pid] = f"reader {log.parent.name}/{log.stem}"

    ReaderProcess.__init__ = named_reader  # type: ignore[method-assign]
    call_listener = Broadcast._call

    def timed(self: Any, listen: Any, call: Any) -> None:
        begun = time.thread_time()
        call_listener(self, listen, call)
        module = getattr(listen, "__module__", type(listen).__module__)
        LISTENERS[module] = LISTENERS.get(module, 0.0) + time.thread_time() - begun

    Broadcast._call = timed  # type: ignore[method-assign]


def record() -> dict[str, Any]:
    """Wait for all processes to end, and return the record."""
    import resource

    while True:
        try:
            wait(-1, 0)
        except ChildProcessError:
            break
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "driver": own.ru_utime + own.ru_stime,
        "children": others.ru_utime + others.ru_stime,
        "listeners": LISTENERS,
        "processes": [[NAMES[pid], spent] for pid, spent in SPENT.items()],
    }


def main() -> None:
    """Run the command, and write the record."""
    path = Path(sys.argv.pop(1))
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    watch()
    from contracts import entrypoint
    from pipelines import __main__ as command

    leave = entrypoint.finish

    def finish(code: int) -> Any:
        path.write_text(json.dumps(record()))
        leave(code)

    entrypoint.finish = finish  # type: ignore[assignment]
    command.start()


if __name__ == "__main__":
    main()
