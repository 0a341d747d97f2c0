"""A pool of processes that run a user's scoring function (annotation/workers/worker.py), with time limits and retries.

Samples are sent in batches of about a tenth of a second of work, so that fast functions have little overhead and the
samples of slow ones are spread over all workers. Results arrive one by one, so that the pool always knows which sample
a worker is scoring.
"""

import math
import os
import select
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from annotation.samples import Sample
from annotation.workers.process import POLL_SECONDS, FunctionProcess
from annotation.workers.worker import DetailedScore, Failed, Ready, RuleTask, TokenRewards, WorkerReply
from contracts import stopping
from contracts.attempt import STALL, beat
from contracts.errors import UserError
from contracts.faults import Fault

PAUSE_SECONDS = 0.002
"""Pause before reading the results of a worker that has many samples, so that several are read at once."""

FunctionResult = float | TokenRewards | DetailedScore | None | Fault
"""A function's result for a sample: a score; None: it cannot score the sample; or the failure."""
Note = Callable[[dict[int, FunctionResult]], None]
"""Callback for new results, by sample index, called as soon as they arrive."""


class LateError(UserError):
    """The import of a function exceeds its time limit."""


def stall_seconds() -> float | None:
    """Seconds without a heartbeat after which the supervisor kills this stage; None without a supervisor."""
    text = os.environ.get(STALL)
    return float(text) if text else None


class FunctionPool:
    """Up to `count` workers, which live as long as this object, so that a function keeps what it has loaded."""

    def __init__(
        self,
        path: str,
        inputs: Sequence[Path] | None,
        settings: Mapping[str, Any] | None = None,
        *,
        title: str = "",
        count: int = 1,
        batch: int = 1,
        limit: float | None = None,
        load_limit: float | None = None,
        instantiates: bool = True,
    ) -> None:
        """Start one worker, and wait until it has loaded the function.

        Args:
            path: path of the function or class.
            inputs: paths that it reads.
            settings: keyword arguments of the function, or of the class's constructor.
            title: the function's name in messages; by default its path.
            count: maximum number of processes.
            batch: answers per call, if the function takes several.
            limit: time limit for scoring one answer, in seconds.
            load_limit: time limit for the import, and for instantiating a class, in seconds.
            instantiates: whether a class is instantiated, or only its signature checked.

        Raises:
            LateError: the import exceeds its time limit.
            UserError: the function cannot be loaded, or its signature does not fit.
        """
        self.title = title or f"function {path!r}"
        self.count, self.batch, self.limit, self.load_limit = count, batch, limit, load_limit
        names = None if inputs is None else [str(path) for path in inputs]
        self.task = RuleTask(path, names, os.getpid(), dict(settings or {}), instantiates)
        self.running: list[FunctionProcess] = []
        self.close = weakref.finalize(self, _end_all, self.running)
        """End the workers, which close their scorers; also called when this object is garbage-collected."""
        self._start()
        while not self.running[0].ready:
            self._poll([], deque(), _ignore)
        self.is_batched = self.running[0].is_batched

    def score(self, samples: Sequence[Sample], note: Note) -> None:
        """Score all samples, in any order, and pass the results to `note`.

        If the stage is asked to stop, it exits once the samples that workers already have are scored.
        """
        todo = deque(range(len(samples)))
        while any(process.pending for process in self.running) or (todo and not stopping.requested()):
            if todo and not stopping.requested():
                self._assign(samples, todo)
            self._poll(samples, todo, note)
        if todo:
            stopping.leave()

    def _assign(self, samples: Sequence[Sample], todo: deque[int]) -> None:
        """Send samples to every idle worker, and start missing workers."""
        for process in [process for process in self.running if not process.busy]:
            if process.has_ended():  # it was idle, so no sample is to blame
                process.kill()
                self.running.remove(process)
            elif todo:
                process.send_samples(samples, todo, self.batch)
        for _ in range(
            min(math.ceil(len(todo) / (self.batch if self.is_batched else 1)), self.count - len(self.running))
        ):
            self._start()

    def _start(self) -> None:
        self.running.append(FunctionProcess(self.task))

    def _poll(self, samples: Sequence[Sample], todo: deque[int], note: Note) -> None:
        """Wait until a worker answers, exits or exceeds its time limit."""
        busy = [process for process in self.running if process.busy]
        if any(process.has_large_backlog for process in busy):
            time.sleep(PAUSE_SECONDS)
        select.select(busy, [], [], POLL_SECONDS)
        beat()
        for process in busy:
            ended = process.has_ended()  # checked first, so that results sent before its end are still read
            found: dict[int, FunctionResult] = {}
            for answer in process.receive():
                self._handle_reply(process, answer, samples, todo, found)
            note(found)
            limit = self.load_limit
            if process.ready:
                limit = self.limit and self.limit * (len(process.pending) if process.is_batched else 1)
            if ended:
                self._remove(process, samples, todo, note)
            elif process.busy and limit is not None and process.waited > limit:
                process.show_traceback()
                self._remove(process, samples, todo, note, late=limit)

    def _handle_reply(
        self,
        process: FunctionProcess,
        answer: WorkerReply | Ready,
        samples: Sequence[Sample],
        todo: deque[int],
        found: dict[int, FunctionResult],
    ) -> None:
        if not process.ready:
            if isinstance(answer, Failed):
                raise UserError(answer.before)
            assert isinstance(answer, Ready)
            process.ready, process.is_batched, process.closes = True, answer.is_batched, answer.closes
        elif answer is True:
            process.adapt(todo, returned=True)
        else:
            assert not isinstance(answer, Ready)
            index = process.pending.popleft()
            if isinstance(answer, Failed):
                text = f"{self.title} {answer.before} {samples[index]}{answer.after}"
                found[index] = Fault(UserError(text))
            else:
                found[index] = answer
            if not process.pending and not process.is_batched:
                process.adapt(todo, returned=False)

    def _remove(
        self,
        process: FunctionProcess,
        samples: Sequence[Sample],
        todo: deque[int],
        note: Note,
        late: float | None = None,
    ) -> None:
        """Remove a worker that ended or is late. Its current sample fails, and its other samples are queued again; of a
        batched function, all samples of the batch fail."""
        self.running.remove(process)
        if late is not None:
            _end_all([process])
        else:
            process.kill()
            time.sleep(2 * POLL_SECONDS)  # if all processes of the job are being killed, this one's signal may follow
            if stopping.requested():
                stopping.leave()
        what = self.title
        if not process.ready:
            if late is not None:
                raise LateError(
                    f"{what} was not imported after {late:g} s; the log shows where it stood. The limit is "
                    "executor.stall_seconds."
                )
            raise UserError(
                f"{what} ended the process that imports it: {process.exit_reason()}. Fix what runs on import."
            )
        if not process.pending:  # it ended when its samples were done; another worker is started if needed
            return
        index = process.pending.popleft()
        together = [index, *process.pending] if process.is_batched else [index]
        which = (
            f"a batch of {len(together)} answers with {samples[index]}" if process.is_batched else f"{samples[index]}"
        )
        if late is not None:
            text = (
                f"{what} has not scored {which} after {late:g} s, and was killed; the log shows where it "
                "stood. Fix it, let it take longer (seconds_per_sample), or let a share of the samples fail "
                "(fail_on_error)."
            )
        else:
            text = (
                f"{what} ended its process on {which}: {process.exit_reason()}. Fix it, or let a share of the "
                "samples fail (fail_on_error)."
            )
        if not process.is_batched:
            todo.extendleft(reversed(process.pending))
        note({place: Fault(UserError(text)) for place in together})


def _ignore(found: dict[int, FunctionResult]) -> None:
    pass


def _end_all(processes: list[FunctionProcess]) -> None:
    """Let all workers exit; those whose class has a `close()` call it first."""
    now = time.monotonic()
    for process in processes:
        process.drop()
    for process in processes:
        process.wait(now)
    processes.clear()
