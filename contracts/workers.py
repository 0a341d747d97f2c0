"""Several processes that share a list of shards, and nothing else: no collective, no barrier.

A process takes the first shard that is neither finished nor claimed. A claim is a file lock, so it ends with its
holder; a killed worker costs the shard in its hand.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from contracts import stopping
from contracts.artifacts import Publication
from contracts.errors import UserError
from contracts.processes import end_groups
from contracts.stage import Context

WORKER = "RATCHET_WORKER"


def share_shards(
    context: Context,
    shards: list[str],
    open_worker: Callable[[], Callable[[str], None]],
    *,
    replicas: int = 1,
    devices: int = 0,
) -> None:
    """Make all `shards`, in this process or in several, and return when each has its receipt.

    Args:
        shards: file names, the largest first where that is known.
        open_worker: loads what a worker needs (an engine, a model) and returns the function that makes and commits
            one shard. Not called where nothing is missing.
        replicas: processes to start. Under a launcher that set RANK and WORLD_SIZE (accelerate, torchrun), its
            processes are the workers and none is started here.
        devices: accelerators per replica; 0 leaves the visible devices as they are.
    """
    if context.world_size > 1:
        _meet(context)
    missing = _missing(context.publication, shards)
    spawn = replicas > 1 and context.world_size == 1 and len(missing) > 1
    if missing and spawn:
        _run_replicas(min(replicas, len(missing)), devices)
    elif missing:
        _work(context, shards, open_worker)
    if context.rank == 0:
        _wait_for_all(context, shards)


def is_worker() -> bool:
    """Whether this process was started by `share_shards` of another one."""
    return WORKER in os.environ


def _missing(publication: Publication, shards: list[str]) -> list[str]:
    finished = publication.receipts()
    return [name for name in shards if name not in finished]


def _published(publication: Publication) -> bool:
    """Whether receipts are missing because rank 0 has found all of them and is publishing."""
    return publication.complete or publication.target.exists()


def _work(context: Context, shards: list[str], open_worker: Callable[[], Callable[[str], None]]) -> None:
    make: Callable[[str], None] | None = None
    for name in shards:
        try:
            with _claim(context.publication, name) as mine:
                if mine and name in _missing(context.publication, [name]) and not _published(context.publication):
                    make = make or open_worker()
                    with stopping.deferred():
                        make(name)
        except FileNotFoundError:
            if context.rank != 0 and context.publication.target.exists():
                return  # rank 0 found everything finished and has published
            raise
        done = len(shards) - len(_missing(context.publication, shards))
        context.progress(done, len(shards), "shards")


@contextlib.contextmanager
def _claim(publication: Publication, name: str) -> Iterator[bool]:
    with (publication.state / f"claim-{name}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _run_replicas(count: int, devices: int) -> None:
    """Start this very command `count` times as workers; the first failure ends the others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(index) for index in range(count * devices)]
    processes = []
    for index in range(count):
        environment: dict[str, Any] = dict(os.environ)
        environment.update({WORKER: str(index), "RANK": str(index + 1), "WORLD_SIZE": str(count + 1)})
        environment["LOCAL_RANK"] = "0" if devices else str(index)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[index * devices : (index + 1) * devices])
        command = [sys.executable, *sys.orig_argv[1:]]
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
    try:
        while any(process.poll() is None for process in processes):
            failed = next((process for process in processes if process.poll() not in (None, 0)), None)
            if failed is not None:
                break
            time.sleep(0.1)
    finally:
        end_groups(processes, stopping.grace_seconds() + 5)
    codes = [process.returncode for process in processes]
    if UserError.exit_code in codes:
        raise UserError("a worker stopped; its message is above.")
    if any(codes):
        raise RuntimeError(f"workers ended with exit codes {codes}; the first failing worker's traceback is above")


def _meet(context: Context) -> None:
    """Under a launcher: wait until rank 0 has cleared what a crash left, before writing anything."""
    if is_worker():  # the starting process cleared already
        return
    publication = context.publication
    mark = f"begun-{os.getppid()}"
    if context.rank == 0:
        (publication.state / mark).touch()
    else:  # rank 0 may not have made the directory yet, or have finished and renamed it already
        begun = publication.directory / "state" / mark
        _wait(lambda: begun.exists() or publication.target.exists(), "rank 0 to begin", 300)


def _wait_for_all(context: Context, shards: list[str]) -> None:
    """Rank 0 waits for the others' last shards, as long as some other process still works on them."""
    while missing := _missing(context.publication, shards):
        for name in missing:
            with _claim(context.publication, name) as free:
                if free and name in _missing(context.publication, [name]):
                    raise RuntimeError(f"shard {name} was not made: its worker ended without finishing it")
        time.sleep(0.1)


def _wait(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
