"""A pool of worker processes that run a user's scoring function (annotation/judge.py), with time limits and retries.

Samples are sent in batches of about a tenth of a second of work: a fast function has little overhead, and a slow one
has its samples spread over all workers. Answers come one by one, so that the sample being judged is always known.
"""

import os
import select
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from annotation.judge import Answer, Failed, TokenRewards
from annotation.judge_process import LOOK_SECONDS, Judge
from annotation.samples import Sample
from contracts import stopping
from contracts.attempt import STALL, beat
from contracts.errors import UserError
from contracts.faults import Fault

NAP_SECONDS = 0.002
"""Pause before reading a worker's answers while it has many samples, so that they are read together."""

Judgement = float | TokenRewards | None | Fault
"""A score; None: the function cannot judge the sample; or why it failed."""
Note = Callable[[dict[int, Judgement]], None]
"""Called with new judgements, by sample index, as soon as they arrive."""


class LateError(UserError):
    """The import of a function takes longer than its limit."""


def stall_seconds() -> float | None:
    """Seconds without a heartbeat after which the supervisor kills this stage; None without a supervisor."""
    text = os.environ.get(STALL)
    return float(text) if text else None


class Judges:
    """Up to `count` workers, which live as long as this object: a function keeps what it has loaded."""

    def __init__(
        self,
        path: str,
        inputs: Sequence[Path] | None,
        *,
        count: int = 1,
        limit: float | None = None,
        load_limit: float | None = None,
    ) -> None:
        """`limit`, `load_limit`: time limits in seconds of one judgement, and of the function's import.

        Raises:
            LateError: the import takes longer.
            UserError: the function cannot be loaded, or its signature does not fit.
        """
        self.path, self.inputs, self.count, self.limit, self.load_limit = path, inputs, count, limit, load_limit
        self.running: list[Judge] = []
        weakref.finalize(self, _end_all, self.running)
        self._start()
        while not self.running[0].ready:
            self._look([], deque(), _ignore)

    def judge(self, samples: Sequence[Sample], note: Note) -> None:
        """Have all samples judged, in any order.

        If the stage is asked to stop, it leaves when those in hand are judged.
        """
        todo = deque(range(len(samples)))
        while any(judge.pending for judge in self.running) or (todo and not stopping.requested()):
            if todo and not stopping.requested():
                self._hand_over(samples, todo)
            self._look(samples, todo, note)
        if todo:
            stopping.leave()

    def _hand_over(self, samples: Sequence[Sample], todo: deque[int]) -> None:
        """Send samples to every idle worker, and start missing workers."""
        for judge in [judge for judge in self.running if not judge.busy]:
            if judge.has_ended():  # with nothing in hand, so no sample is to blame
                judge.kill()
                self.running.remove(judge)
            elif todo:
                judge.hand_over(samples, todo)
        for _ in range(min(len(todo), self.count - len(self.running))):
            self._start()

    def _start(self) -> None:
        self.running.append(Judge(self.path, self.inputs))

    def _look(self, samples: Sequence[Sample], todo: deque[int], note: Note) -> None:
        """Wait until a worker answers, exits or exceeds its time limit."""
        busy = [judge for judge in self.running if judge.busy]
        if any(judge.many for judge in busy):
            time.sleep(NAP_SECONDS)
        select.select(busy, [], [], LOOK_SECONDS)
        beat()
        for judge in busy:
            ended = judge.has_ended()  # asked first: what it has said before is read now
            found: dict[int, Judgement] = {}
            for answer in judge.answers():
                self._take(judge, answer, samples, todo, found)
            note(found)
            limit = self.limit if judge.ready else self.load_limit
            if ended:
                self._bury(judge, samples, todo, note)
            elif judge.busy and limit is not None and judge.waited > limit:
                judge.show_traceback()
                self._bury(judge, samples, todo, note, late=limit)

    def _take(
        self,
        judge: Judge,
        answer: Answer,
        samples: Sequence[Sample],
        todo: deque[int],
        found: dict[int, Judgement],
    ) -> None:
        if not judge.ready:
            if isinstance(answer, Failed):
                raise UserError(answer.before)
            judge.ready = True
        elif answer is True:
            judge.adapt(todo, given_back=True)
        else:
            index = judge.pending.popleft()
            if isinstance(answer, Failed):
                text = f"function {self.path!r} {answer.before} {samples[index]}{answer.after}"
                found[index] = Fault(UserError(text))
            else:
                found[index] = answer
            if not judge.pending:
                judge.adapt(todo, given_back=False)

    def _bury(
        self,
        judge: Judge,
        samples: Sequence[Sample],
        todo: deque[int],
        note: Note,
        late: float | None = None,
    ) -> None:
        """The current sample has failed; the worker's other samples go to other workers."""
        judge.kill()
        self.running.remove(judge)
        if late is None:
            time.sleep(2 * LOOK_SECONDS)  # who kills all processes of a job may be about to kill this one
            if stopping.requested():
                stopping.leave()
        what = f"function {self.path!r}"
        if not judge.ready:
            if late is not None:
                raise LateError(
                    f"{what} was not imported after {late:g} s; the log shows where it stood. It may take "
                    "executor.stall_seconds."
                )
            raise UserError(
                f"{what} ended the process that imports it: {judge.how_it_ended()}. Fix what runs on import."
            )
        if not judge.pending:  # it ended after its work; another one is started where it is needed
            return
        index = judge.pending.popleft()
        if late is not None:
            text = (
                f"{what} has not judged {samples[index]} after {late:g} s, and was ended; the log shows where it "
                "stood. Fix it, let it take longer (seconds_per_sample), or let a share of the samples fail "
                "(fail_on_error)."
            )
        else:
            text = (
                f"{what} ended its process on {samples[index]}: {judge.how_it_ended()}. Fix it, or let a share of the "
                "samples fail (fail_on_error)."
            )
        todo.extendleft(reversed(judge.pending))
        note({index: Fault(UserError(text))})


def _ignore(found: dict[int, Judgement]) -> None:
    pass


def _end_all(judges: list[Judge]) -> None:
    for judge in judges:
        judge.connection.close()
    for judge in judges:
        judge.wait()
