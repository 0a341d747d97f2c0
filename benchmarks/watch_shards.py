"""Measures how processes that share the shards of a stage spend their time; benchmarks/slurm.py loads it into them."""

import atexit
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "BENCHMARK_SHARDS"
"""The environment variable with the folder into which every process writes its measurements when it ends."""
PARTS = ("loop", "open", "make", "write")
"""loop: from the first search for a shard to the last. Within it, open: loading the model; make: computing and
committing shards; and within that, write: writing and committing their rows."""


def watch() -> None:
    """Make this process measure its work on shards: each part in wall seconds and CPU seconds."""
    from contracts import workers
    from contracts.publication import Publication

    spent: dict[str, list[float]] = {part: [0.0, 0.0] for part in PARTS}
    shards: list[str] = []

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        clock, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent[part][0] += time.perf_counter() - clock
            spent[part][1] += time.process_time() - cpu

    def measured(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with timed(part):
                return function(*arguments, **options)

        return call

    run_worker = workers._run_worker

    def timed_worker(context: Any, names: list[str], open_worker: Callable[[], Callable[[str], None]]) -> None:
        def timed_open() -> Callable[[str], None]:
            with timed("open"):
                compute = open_worker()

            def timed_make(name: str) -> None:
                with timed("make"):
                    compute(name)
                shards.append(name)

            return timed_make

        with timed("loop"):
            run_worker(context, names, timed_open)

    workers._run_worker = timed_worker
    Publication.write_rows = measured("write", Publication.write_rows)  # type: ignore[method-assign]

    def write_measurements() -> None:
        text = json.dumps({"shards": shards, "cpu": time.process_time(), "ended": time.time(), **spent})
        Path(os.environ[FOLDER], f"{socket.gethostname()}-{os.getpid()}.json").write_text(text)

    atexit.register(write_measurements)


def read(folder: Path) -> list[dict[str, Any]]:
    """The measurements of all processes."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
