"""Distributes the shards of a stage over several processes, which share nothing else: no collective, no barrier.

A process takes the first shard that is neither finished nor claimed. A claim is a file lock, so it ends with the
process that holds it; a killed worker loses only its current shard.

The processes either run on one machine, started by `share_shards` itself or by a launcher, and the first one publishes;
or they are tasks on any machines that share the file system, where each may start, end and be killed at any time, and
after all have ended, a publisher publishes. RATCHET_ROLE says which of these a process is (contracts/stage.py).
"""

import contextlib
import fcntl
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contracts import stopping
from contracts.attempt import ROLE
from contracts.errors import TransientError, UserError
from contracts.files import process_name, write_atomically
from contracts.following import Source
from contracts.forks import WARM_LABEL, WARM_SOCKET, Process, start_or_fork, stays
from contracts.locks import take_lock, try_lock
from contracts.manifest import MANIFEST
from contracts.processes import end_groups
from contracts.publication import MOST_NAMED, Publication
from contracts.stage import Context
from contracts.warm import REPLICA

POLL_SECONDS = 0.5
"""Interval at which a worker looks for shards that others have finished."""


def share_shards(
    context: Context,
    shards: list[str] | Source,
    open_worker: Callable[[], Callable[[str], None]],
    *,
    replicas: int = 1,
    devices: int = 0,
) -> None:
    """Compute all `shards`, in this process or in several, and return when each has its receipt.

    A process that does not publish returns when there is no shard left for it.

    Args:
        shards: file names, largest first if the sizes are known; or an input, from each of whose shards one shard is
            computed, as soon as it is finished if the input is still being made.
        open_worker: loads what a worker needs (an engine, a model) and returns the function that computes and commits
            one shard. Not called if no shard is missing; called early if further shards are still expected.
        replicas: number of processes to start. Under a launcher that sets RANK and WORLD_SIZE (accelerate, torchrun),
            its processes are the workers, and none are started here; nor are any by a process with a role.
        devices: accelerators per replica; 0 leaves the visible devices unchanged.

    Raises:
        TransientError: this process is a publisher, and a shard is missing.
    """
    if context.world_size > 1 and context.role is None:
        _wait_for_rank_0(context)
    work = Work(shards)
    if isinstance(shards, Source):
        context.publication.made_from = shards.made_from
    again = True
    while again:
        names = work.names()
        missing = _missing(context.publication, names)
        context.progress(len(names) - len(missing), work.total(names), "shards")
        if context.role == "publisher":
            work.require_whole()
            _require_none(missing, len(names))
            return
        most = len(missing) if work.whole else replicas
        if most > 1 and replicas > 1 and context.world_size == 1 and context.role is None:
            _run_replicas(min(replicas, most), devices)
        elif most:
            _run_worker(context, work, open_worker)
        again = False
        if context.publishes:
            _wait_for_all(context, work)
            again = isinstance(shards, Source) and bool(context.publication.drop_outdated())


class Work:
    """The shards to compute: a fixed list, or one per shard that an input has so far."""

    def __init__(self, shards: list[str] | Source) -> None:
        self._shards = shards

    @property
    def whole(self) -> bool:
        """Whether all shards are known."""
        return not isinstance(self._shards, Source) or self._shards.whole

    def refresh(self) -> None:
        """Look whether all shards are known by now."""
        if isinstance(self._shards, Source):
            self._shards.refresh()

    def names(self) -> list[str]:
        """The known shards, in the order in which to compute them."""
        return self._shards.names() if isinstance(self._shards, Source) else self._shards

    def total(self, names: list[str]) -> int:
        """Minimum total number of shards: one more than is known if the input is still being made."""
        return len(names) + (not self.whole)

    def wait(self, context: Context) -> None:
        """Wait for a moment before the next look."""
        assert isinstance(self._shards, Source)
        with context.timed("wait"):
            self._shards.wait()

    def require_whole(self) -> None:
        """Raise TransientError unless all shards are known."""
        self.refresh()
        if isinstance(self._shards, Source) and not self._shards.whole:
            raise TransientError(f"{self._shards.path} is not published; the stage that makes it ended without it.")


def agree(context: Context, name: str, value: str) -> str:
    """Agree on one value among all processes of a stage, on any machines: that of the first process to call this.

    The value stays the same until the stage has published, even if the stage is interrupted and continues elsewhere.
    """
    folder = context.publication.directory / "state"
    path = folder / f"agreed-{name}"
    with path.with_suffix(".lock").open("w") as file:
        while not try_lock(file, fcntl.LOCK_EX):
            time.sleep(0.05)
        if not path.exists():
            write_atomically(path, value.encode())
        return path.read_text(encoding="utf-8")


def _missing(publication: Publication, shards: list[str]) -> list[str]:
    return [name for name in shards if publication.receipt(name) is None]


def _require_none(missing: list[str], count: int) -> None:
    if missing:
        names = ", ".join([*missing[:MOST_NAMED], *(["..."] if len(missing) > MOST_NAMED else [])])
        raise TransientError(
            f"{len(missing)} of {count} shards are missing: {names}; the tasks that had them ended. Tasks that are "
            "started again compute only these."
        )


def _published(publication: Publication) -> bool:
    """Whether receipts are missing because rank 0 has found all of them and is publishing."""
    return (publication.directory / MANIFEST).exists() or publication.target.exists()


def _run_worker(context: Context, work: Work, open_worker: Callable[[], Callable[[str], None]]) -> None:
    """Compute shards until all are finished or claimed, and no further ones are expected."""
    publication = context.publication
    claims = publication.directory / "state"
    if context.publishes or context.role is not None:  # otherwise rank 0 creates it, and may have renamed it already
        claims = publication.state
    make: Callable[[str], None] | None = None
    found_work = True
    while found_work or not work.whole:  # look again after the last one: another process may have died meanwhile
        if not found_work:
            make = make or open_worker()  # so that everything is loaded when the next shard is ready
            work.wait(context)
        found_work = False
        looked = -math.inf
        work.refresh()
        names = work.names()
        for name in names:
            if time.monotonic() - looked > POLL_SECONDS:
                finished = publication.finished(names)
                looked = time.monotonic()
                context.progress(len(finished), work.total(names), "shards")
            if name in finished:
                continue
            try:
                with _claim(claims, name) as mine:
                    # Check the receipt after the claim: an NFS client may cache for a while that it did not exist.
                    if mine and publication.receipt(name) is None and not _published(publication):
                        make = make or open_worker()
                        with stopping.deferred():
                            make(name)
                        found_work = True
            except FileNotFoundError:
                if not context.publishes and _published(publication):
                    return  # rank 0 found everything finished
                raise
    context.progress(len(publication.finished(names)), len(names), "shards")


@contextlib.contextmanager
def _claim(claims: Path, name: str) -> Iterator[bool]:
    with (claims / f"claim-{name}").open("w") as file:
        try:
            take_lock(file, fcntl.LOCK_EX)
        except BlockingIOError:
            yield False
            return
        yield True


def _run_replicas(count: int, devices: int) -> None:
    """Start this command `count` times as workers; the first failure ends the others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(index) for index in range(count * devices)]
    processes: list[Process] = []
    for index in range(count):
        environment: dict[str, Any] = dict(os.environ)
        environment.update({ROLE: "replica", "RANK": str(index + 1), "WORLD_SIZE": str(count + 1)})
        environment["LOCAL_RANK"] = "0" if devices else str(index)
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[index * devices : (index + 1) * devices])
        processes.append(_start_replica(environment, index))
    try:
        while any(process.poll() is None for process in processes):
            failed = next((process for process in processes if process.poll() not in (None, 0)), None)
            if failed is not None:
                break
            time.sleep(0.1)
    finally:
        end_groups([process for process in processes if not stays(process)], stopping.grace_seconds() + 5)
    codes = [process.returncode for process in processes]
    if UserError.exit_code in codes:
        raise UserError("a worker stopped; its message is above.")
    if any(codes):
        raise RuntimeError(f"workers ended with exit codes {codes}; the first failing worker's traceback is above")


def _start_replica(environment: dict[str, str], index: int) -> Process:
    """Start this command again as a replica; if this stage was forked, fork the replica too.

    A forked replica may be one that has run the same replica of an earlier stage, and waits for the next one with the
    engine or model that it has loaded (contracts/warm.py).
    """
    warm_socket, label = os.environ.get(WARM_SOCKET), os.environ.get(WARM_LABEL)
    path = Path(warm_socket) if warm_socket and "-m" in sys.orig_argv else None
    return start_or_fork(path, sys.orig_argv, environment, label=f"{label}{REPLICA}{index}" if label else "")


def _wait_for_rank_0(context: Context) -> None:
    """Under a launcher, wait until rank 0 has cleaned up after an earlier crash, before anything is written."""
    publication = context.publication
    mark = f"begun-{process_name(os.getppid())}"
    if context.rank == 0:
        (publication.state / mark).touch()
    else:  # rank 0 may not have created the directory yet, or may have finished and renamed it already
        started = publication.directory / "state" / mark
        _wait(lambda: started.exists() or publication.target.exists(), "rank 0 to begin", 300)


def _wait_for_all(context: Context, work: Work) -> None:
    """In rank 0, wait for the last shards of the other processes, as long as these still work on them."""
    work.refresh()
    missing = work.names()
    while missing := _missing(context.publication, missing):
        for name in missing:
            with _claim(context.publication.state, name) as free:
                if free and context.publication.receipt(name) is None:
                    raise RuntimeError(f"shard {name} was not made: its worker ended without finishing it")
        time.sleep(0.1)


def _wait(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
