"""The stage's side of a worker process: starts it, sends it samples, and receives results."""

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
"""Target duration of one batch of samples, in seconds."""
LARGEST_BUNCH = 4096
LOOK_SECONDS = 0.2
"""Interval at which a silent worker is checked, in seconds."""
LEAVE_SECONDS = 5.0
"""Time limit for a worker to exit when all samples are scored, as it may have something to save."""


class FunctionProcess:
    """One worker process."""

    def __init__(self, task: RuleTask) -> None:
        self.path = task.path
        self.pending: deque[int] = deque()
        """Indices of the samples that were sent and have no result yet; the first one is being scored."""
        self.ready = False
        self.takes_many = False
        """Whether the function takes a whole batch; the worker reports this when it is ready."""
        self.waited = 0.0
        """Seconds since the last result, not counting time in which this process itself was suspended."""
        self._bunch = 1
        self._handed = 0
        self._began = 0.0
        self._buffer = b""
        self._silenced = False
        self._alive_when_silenced = False
        self._looked = time.monotonic()
        ours, theirs = socket.socketpair()
        # The worker gets this process's sys.path instead of its working directory, as a user's files may be named like
        # libraries.
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
        """File descriptor of the connection, for `select`."""
        return self.connection.fileno()

    def hand_over(self, samples: Sequence[Sample], todo: deque[int], batch: int) -> None:
        """Send the next samples: `batch` of them if the function takes a whole batch, or else an adaptive number."""
        count = min(batch if self.takes_many else self._bunch, len(todo))
        self.pending.extend(todo.popleft() for _ in range(count))
        self._handed, self._began, self.waited = count, time.monotonic(), 0.0
        self._looked = self._began
        self._send([_request(samples[index]) for index in self.pending])

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `has_ended` will find
            self.connection.sendall(msgspec.json.encode(message) + b"\n")

    def answers(self) -> list[Answer]:
        """The results that have arrived; if there are any, the worker's time limit starts anew."""
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
        """Queue the samples again that it has not started, and adapt the size of its next batch."""
        done = self._handed - len(self.pending)
        todo.extendleft(reversed(self.pending))
        self.pending.clear()
        if given_back:
            self._bunch = max(1, done)
        elif time.monotonic() - self._began < BUNCH_SECONDS / 2:
            self._bunch = min(4 * self._handed, LARGEST_BUNCH)

    @property
    def busy(self) -> bool:
        """Whether a result is awaited."""
        return not self.ready or bool(self.pending)

    @property
    def many(self) -> bool:
        """Whether it has so many samples that their results are better read several at once."""
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
        """Let it exit, after its connection was closed; kill it if it is scoring a sample or does not exit in time."""
        if not self.busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LEAVE_SECONDS)
        self.kill()

    def how_it_ended(self) -> str:
        """A description of how it ended.

        Raises:
            TransientError: a preemption signal ended it.
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
    """The file descriptor that this process prints to now; None: the one it was started with."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _request(sample: Sample) -> list[object]:
    rollout, completion = sample
    tools = None if rollout.tools is msgspec.UNSET else rollout.tools
    given = [rollout.messages, completion.text, completion.finish_reason, rollout.answer, rollout.tags, tools]
    return [*given, completion.response_ids, rollout.prompt_id, completion.sample]
