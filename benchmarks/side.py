"""The protocol between a benchmark and the processes of its sides, which work in turns.

A side is a process. It loads everything and writes a line. Then, for each line that it reads, it does one unit of work
and writes a line with the CPU seconds that it took. So two sides are loaded at the same time and take turns.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def cpu_seconds() -> float:
    """The CPU time (user and system) of this process with all of its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Side:
    """The side's end of the protocol. Other output of the process goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._phases: dict[str, float] = {}
        self._start = 0.0
        self._begin = 0.0

    def ready(self, **facts: Any) -> None:
        """Report that everything is loaded, and wait for the first request."""
        self._say(facts)
        self._wait()

    def done(self, **figures: Any) -> None:
        """Report the unit that ends here, and wait for the next request. If there is none, end the process."""
        cpu = cpu_seconds() - self._start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._say(
            {
                "cpu_seconds": cpu,
                "seconds": time.perf_counter() - self._begin,
                "phases": self._phases,
                "peak_memory_gib": memory,
                **figures,
            }
        )
        self._wait()

    def exclude(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is not counted in a unit."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start, phases = cpu_seconds(), dict(self._phases)
            result = function(*args, **kwargs)
            self._start += cpu_seconds() - start
            self._phases = phases
            return result

        return wrapped

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is also reported under `phase`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = cpu_seconds()
            result = function(*args, **kwargs)
            self._phases[phase] = self._phases.get(phase, 0.0) + cpu_seconds() - start
            return result

        return wrapped

    def _say(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._out, flush=True)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.stderr.flush()
            os._exit(0)  # the only way out of a trainer's loop
        self._phases = {}
        self._start, self._begin = cpu_seconds(), time.perf_counter()


class Child:
    """The benchmark's end of the protocol: a side that runs in its own process."""

    def __init__(self, python: str, module: str, path: Path, environment: dict[str, str]) -> None:
        """Start `module` of this folder with the file `path` and wait until it has loaded everything."""
        command = [python, "-m", f"benchmarks.{module}", str(path)]
        self.name = module
        self.log = path.with_suffix(".log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
            )
        self.facts = self._read()

    def unit(self) -> dict[str, Any]:
        """Request one unit of work, and return its report."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(
                f"{self.name} ended with code {code}; the end of its log:\n{self.log.read_text()[-3000:]}"
            )
        found: dict[str, Any] = json.loads(line)
        return found
