"""Processes that judge samples by a function of the user's own (annotation/judge.py), and what becomes of them.

Samples are handed over in bunches that take about `BUNCH_SECONDS`, so that a function that takes microseconds is not
slowed down, and one that takes seconds has its samples spread over all processes. Answers come one by one, so the
sample in hand is known whatever happens to the process.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from annotation.judge import Answer, Failed, Task
from annotation.samples import Sample
from contracts import stopping
from contracts.attempt import STALL, beat
from contracts.errors import TransientError, UserError
from contracts.faults import Fault

BUNCH_SECONDS = 0.1
LARGEST_BUNCH = 1024
LOOK_SECONDS = 0.2
"""How often a process that says nothing is looked at."""
NAP_SECONDS = 0.002
"""How long answers are let come together where a process has many samples in hand."""
LEAVE_SECONDS = 5.0
"""How long a process may take to end, when everything is judged: it may have something to save."""

Judgement = float | None | Fault
"""A score, None where the function cannot judge, or why there is none."""
Note = Callable[[dict[int, Judgement]], None]
"""Is told judgements by the index of their samples, as soon as they are there."""


def stall_seconds() -> float | None:
    """After how long a silence this stage would be ended, if it is supervised."""
    text = os.environ.get(STALL)
    return float(text) if text else None


class Judge:
    """One process."""

    def __init__(self, path: str, inputs: Sequence[Path] | None) -> None:
        self.path = path
        self.pending: deque[int] = deque()
        """Indices of the samples in hand, the one being judged first."""
        self.ready = False
        self.waited = 0.0
        """Seconds since the last answer, without those in which this process was stopped itself."""
        self._bunch = 1
        self._handed = 0
        self._began = 0.0
        self._buffer = b""
        self._silenced = False
        self._alive_when_silenced = False
        self._looked = time.monotonic()
        ours, theirs = socket.socketpair()
        # As this process finds its modules, wherever it was started: a user's files may be named like libraries.
        code = f"import sys; sys.path[:] = {sys.path!r}; from annotation.judge import main; main({theirs.fileno()})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self.connection = ours
        self._send(Task(path, None if inputs is None else [str(path) for path in inputs], os.getpid()))

    def fileno(self) -> int:
        """For `select`."""
        return self.connection.fileno()

    def hand_over(self, samples: Sequence[Sample], todo: deque[int]) -> None:
        """Give it the next samples."""
        count = min(self._bunch, len(todo))
        self.pending.extend(todo.popleft() for _ in range(count))
        self._handed, self._began, self.waited = count, time.monotonic(), 0.0
        self._looked = self._began
        self._send([_request(samples[index]) for index in self.pending])

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is seen when it is looked at
            self.connection.sendall(msgspec.json.encode(message) + b"\n")

    def answers(self) -> list[Answer]:
        """What it has said meanwhile; its time is counted from here."""
        now = time.monotonic()
        self.waited += min(now - self._looked, 5 * LOOK_SECONDS)
        self._looked = now
        received = []
        try:
            while part := self.connection.recv(1 << 18, socket.MSG_DONTWAIT):
                received.append(part)
            self._silenced = True
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self._silenced = True
        whole, newline, rest = b"".join([self._buffer, *received]).rpartition(b"\n")
        self._buffer = rest
        if not newline:
            return []
        self.waited = 0.0
        return msgspec.json.decode(b"[" + whole.replace(b"\n", b",") + b"]", type=list[Answer])

    def has_ended(self) -> bool:
        """Whether nothing more will come from it."""
        if self._silenced and self.process.poll() is None:
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._alive_when_silenced = True
        return self._silenced or self.process.poll() is not None

    def adapt(self, todo: deque[int], *, given_back: bool) -> None:
        """Take back what it has not begun, and see how many samples it can be given next."""
        done = self._handed - len(self.pending)
        todo.extendleft(reversed(self.pending))
        self.pending.clear()
        if given_back:
            self._bunch = max(1, done)
        elif time.monotonic() - self._began < BUNCH_SECONDS / 2:
            self._bunch = min(2 * self._handed, LARGEST_BUNCH)

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited."""
        return not self.ready or bool(self.pending)

    @property
    def many(self) -> bool:
        """Whether so many samples are in hand that their answers had better be read together."""
        return len(self.pending) > 32

    def kill(self) -> None:
        """End it at once, and all that it has started in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def show_traceback(self) -> None:
        """Have it write where it stands to the log."""
        self.process.send_signal(signal.SIGQUIT)
        time.sleep(LOOK_SECONDS)

    def wait(self) -> None:
        """Once its connection is closed, let it come to its end, unless it is in the middle of something."""
        if not self.busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LEAVE_SECONDS)
        self.kill()

    def how_it_ended(self) -> str:
        """In words.

        Raises:
            TransientError: by a signal from outside.
        """
        code = self.process.returncode
        if self._silenced and self._alive_when_silenced:
            return "it closed the connection to the stage"
        if code in [-number for number in stopping.SIGNALS]:
            raise TransientError(f"the process of function {self.path!r} was ended by {signal.Signals(-code).name}.")
        if code == -signal.SIGKILL:
            return "it was killed by SIGKILL: by the system, if its memory ran out (dmesg says so), or by somebody"
        if code < 0:
            return f"it crashed by {signal.Signals(-code).name}; the log shows where"
        return f"it left with exit code {code}, as by os._exit"


class Judges:
    """Up to `count` processes, which live until this object goes: what a function has loaded, it keeps."""

    def __init__(self, path: str, inputs: Sequence[Path] | None, count: int, limit: float | None) -> None:
        """`limit`: seconds that one judgement may take.

        Raises:
            UserError: the function cannot be loaded, or not be called as it will be.
        """
        self.path, self.inputs, self.count, self.limit = path, inputs, count, limit
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
                for judge in self.running:
                    if todo and not judge.busy:
                        judge.hand_over(samples, todo)
                if todo and len(self.running) < self.count:
                    self._start()
            self._look(samples, todo, note)
        if todo:
            stopping.leave()

    def _start(self) -> None:
        self.running.append(Judge(self.path, self.inputs))

    def _look(self, samples: Sequence[Sample], todo: deque[int], note: Note) -> None:
        """Wait until a process says something, or ends, or has said nothing for too long."""
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
            limit = self.limit if judge.ready else stall_seconds()
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
        """The sample in hand has failed; the others are for other processes."""
        judge.kill()
        self.running.remove(judge)
        if late is None:
            time.sleep(2 * LOOK_SECONDS)  # who kills all processes of a job may be about to kill this one
            if stopping.requested():
                stopping.leave()
        what = f"function {self.path!r}"
        if not judge.ready:
            if late is not None:
                raise UserError(
                    f"{what} was not imported after {late:g} s (executor.stall_seconds). The log shows where."
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


def _request(sample: Sample) -> list[object]:
    rollout, completion = sample
    tools = None if rollout.tools is msgspec.UNSET else rollout.tools
    return [rollout.messages, completion.text, completion.finish_reason, rollout.answer, rollout.tags, tools]
