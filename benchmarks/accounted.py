"""The command `pipeline`, with a record of where its CPU time went; benchmarks/overhead.py starts it.

    python benchmarks/accounted.py RECORD ARGUMENTS OF pipeline ...

Every process that has ended is asked for its time and that of its descendants as the kernel counts it (wait4), so
nothing is sampled and nothing depends on what else the machine does. Of the driver's own time, that of each listener.
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
"""By process, the CPU seconds of those that were waited for, with their descendants."""
NAMES: dict[int, str] = {}
"""Its command; of one that this process has not started, the name that the kernel has for it."""
LISTENERS: dict[str, float] = {}
_SUBREAPER = 36
OF_READERS = ("wandb-core", "gpu_stats")
"""Processes, by the names that the kernel has for them, that readers start and do not wait for."""


@dataclass(frozen=True)
class Parts:
    """What a run took, in CPU seconds."""

    watching: dict[str, float]
    """By who watches or publishes: readers by their logs, checks of hooks, and listeners in the driver."""
    all: float

    @property
    def watched(self) -> float:
        """All who watch or publish."""
        return sum(self.watching.values())

    @property
    def share(self) -> float:
        """Their part of everything."""
        return self.watched / self.all


def parts_of(record: dict[str, Any]) -> Parts:
    """What a record says."""
    found: Counter[str] = Counter()
    for name, spent in record["processes"]:
        if name.startswith("reader "):
            found[name] += spent
        elif "contracts.trial" in name:
            found["checks of functions"] += spent
        elif name in OF_READERS:
            found[f"left by a reader: {name}"] += spent
    for module, spent in record["listeners"].items():
        found[f"in the driver: {module.rpartition('.')[2]}"] += spent
    return Parts(dict(found), record["driver"] + record["children"])


def wait(pid: int, options: int) -> tuple[int, int]:
    """`os.waitpid`, which takes down what the process has used."""
    with contextlib.suppress(ChildProcessError):  # which wait4 raises again
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
    """Have this process take down who it starts, and what its listeners take."""
    assert "subprocess" not in sys.modules, "it has taken os.waitpid already"
    os.waitpid = wait
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # who outlives its parent is waited for here
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
    guarded = Broadcast._guarded

    def timed(self: Any, listen: Any, call: Any) -> None:
        begun = time.thread_time()
        guarded(self, listen, call)
        module = getattr(listen, "__module__", type(listen).__module__)
        LISTENERS[module] = LISTENERS.get(module, 0.0) + time.thread_time() - begun

    Broadcast._guarded = timed  # type: ignore[method-assign]


def record() -> dict[str, Any]:
    """What was taken down, when everything has ended."""
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
    """Run the command, and write the record beside it."""
    path = Path(sys.argv.pop(1))
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    watch()
    from contracts import surroundings
    from pipelines import __main__ as command

    leave = surroundings.finish

    def finish(code: int) -> Any:
        path.write_text(json.dumps(record()))
        leave(code)

    surroundings.finish = finish  # type: ignore[assignment]
    command.start()


if __name__ == "__main__":
    main()
