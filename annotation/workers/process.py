"""One worker process of a user's scoring function, as seen by the stage: samples sent, answers received."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TextIO

import msgspec

from annotation.samples import Sample
from annotation.workers.worker import Answer, RuleTask
from contracts import stopping
from contracts.errors import TransientError

BUNCH_SECONDS = 0.1
"""Target duration of one batch of samples."""
LARGEST_BUNCH = 4096
LOOK_SECONDS = 0.2
"""How often a silent worker is checked."""
LEAVE_SECONDS = 5.0
"""How long a worker may take to exit when everything is judged: it may have something to save."""


class FunctionProcess:
    """One worker process."""

    def __init__(self, task: RuleTask) -> None:
        self.path = task.path
        self.pending: deque[int] = deque()
        """Indices of the samples sent and not answered, the one being judged first."""
        self.ready = False
        self.takes_many = False
        """Whether it judges batches as a whole, as it says when it is ready."""
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
        call = f"from annotation.workers.worker import main; main({theirs.fileno()})"
        code = f"import sys; sys.path[:] = {sys.path!r}; {call}"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL, stdout=_descriptor(sys.stdout), pass_fds=[theirs.fileno()],
                start_new_session=True,
            )  # fmt: skip
        self.connection = ours
        self._send(task)

    def fileno(self) -> int:
        """For `select`."""
        return self.connection.fileno()

    def hand_over(self, samples: Sequence[Sample], todo: deque[int], batch: int) -> None:
        """Send the next samples, `batch` of them if they are judged as a whole."""
        count = min(batch if self.takes_many else self._bunch, len(todo))
        self.pending.extend(todo.popleft() for _ in range(count))
        self._handed, self._began, self.waited = count, time.monotonic(), 0.0
        self._looked = self._began
        self._send([_request(samples[index]) for index in self.pending])

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is seen when it is looked at
            self.connection.sendall(msgspec.json.encode(message) + b"\n")

    def answers(self) -> list[Answer]:
        """The answers that have arrived; restarts the worker's clock."""
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
        """Whether the worker has closed its connection."""
        if self._silenced and self.process.poll() is None:
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._alive_when_silenced = True
        return self._silenced or self.process.poll() is not None

    def adapt(self, todo: deque[int], *, given_back: bool) -> None:
        """Take back the samples that it has not started, and adapt the size of its next batch."""
        done = self._handed - len(self.pending)
        todo.extendleft(reversed(self.pending))
        self.pending.clear()
        if given_back:
            self._bunch = max(1, done)
        elif time.monotonic() - self._began < BUNCH_SECONDS / 2:
            self._bunch = min(4 * self._handed, LARGEST_BUNCH)

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited."""
        return not self.ready or bool(self.pending)

    @property
    def many(self) -> bool:
        """Whether so many samples are in hand that their answers had better be read together."""
        return len(self.pending) > 32

    def kill(self) -> None:
        """Kill it and its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def show_traceback(self) -> None:
        """Make it write a stack dump to the log."""
        self.process.send_signal(signal.SIGQUIT)
        time.sleep(LOOK_SECONDS)

    def wait(self) -> None:
        """Close its connection and let it exit; kill it if it is judging a sample."""
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


def _descriptor(stream: TextIO) -> int | None:
    """Where this process prints to by now; None: where it began to."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _request(sample: Sample) -> list[object]:
    rollout, completion = sample
    tools = None if rollout.tools is msgspec.UNSET else rollout.tools
    given = [rollout.messages, completion.text, completion.finish_reason, rollout.answer, rollout.tags, tools]
    return [*given, completion.response_ids, rollout.prompt_id, completion.sample]
