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
from annotation.workers.worker import Ready, RuleTask, WorkerReply
from contracts import stopping
from contracts.attempt import beat
from contracts.errors import TransientError

BATCH_SECONDS = 0.1
"""Target duration of one batch of samples, in seconds."""
MAX_BATCH = 4096
POLL_SECONDS = 0.2
"""Interval at which a silent worker is checked, in seconds."""
EXIT_SECONDS = 5.0
"""Time limit for a worker to exit when all samples are scored, as it may have something to save."""
CLOSE_SECONDS = 30.0
"""Time limit for a worker whose class has a `close()` to end its call, close and exit, in seconds."""


class FunctionProcess:
    """One worker process."""

    def __init__(self, task: RuleTask) -> None:
        self.path = task.path
        self.pending: deque[int] = deque()
        """Indices of the samples that were sent and have no result yet; the first one is being scored."""
        self.ready = False
        self.is_batched = False
        """Whether the function takes a whole batch; the worker reports this when it is ready."""
        self.closes = False
        """Whether its class has a `close()`, which it calls before it exits; reported when it is ready."""
        self.waited = 0.0
        """Seconds since the last result, not counting time in which this process itself was suspended."""
        self._may_take = 0.0
        self._batch_size = 1
        self._sent = 0
        self._began = 0.0
        self._buffer = b""
        self._disconnected = False
        self._alive_when_disconnected = False
        self._last_poll = time.monotonic()
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

    def send_samples(self, samples: Sequence[Sample], todo: deque[int], batch: int) -> None:
        """Send the next samples: `batch` of them if the function takes a whole batch, or else an adaptive number."""
        count = min(batch if self.is_batched else self._batch_size, len(todo))
        self.pending.extend(todo.popleft() for _ in range(count))
        self._sent, self._began, self.waited = count, time.monotonic(), 0.0
        self._last_poll = self._began
        self._send([_request(samples[index]) for index in self.pending])

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `has_ended` will find
            self.connection.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self) -> list[WorkerReply | Ready]:
        """Read the results that have arrived; if there are any, the worker's time limit starts again."""
        now = time.monotonic()
        self.waited += min(now - self._last_poll, 5 * POLL_SECONDS)
        self._last_poll = now
        received = []
        try:
            while part := self.connection.recv(1 << 18, socket.MSG_DONTWAIT):
                received.append(part)
            self._disconnected = True
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self._disconnected = True
        whole, newline, rest = b"".join([self._buffer, *received]).rpartition(b"\n")
        self._buffer = rest
        if not newline:
            return []
        self.waited = 0.0
        return msgspec.json.decode(b"[" + whole.replace(b"\n", b",") + b"]", type=list[WorkerReply | Ready])

    def has_ended(self) -> bool:
        """Whether the worker has exited or closed its connection."""
        if self._disconnected and self.process.poll() is None:
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._alive_when_disconnected = True
        return self._disconnected or self.process.poll() is not None

    def adapt(self, todo: deque[int], *, returned: bool) -> None:
        """Put the samples that it has not started back into `todo`, and adapt the size of its next batch."""
        done = self._sent - len(self.pending)
        todo.extendleft(reversed(self.pending))
        self.pending.clear()
        if returned:
            self._batch_size = max(1, done)
        elif time.monotonic() - self._began < BATCH_SECONDS / 2:
            self._batch_size = min(4 * self._sent, MAX_BATCH)

    @property
    def busy(self) -> bool:
        """Whether a result is awaited."""
        return not self.ready or bool(self.pending)

    @property
    def has_large_backlog(self) -> bool:
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
        time.sleep(POLL_SECONDS)

    def drop(self) -> None:
        """Close its connection, so that it exits; interrupt the call in progress if its class has a `close()`."""
        if not self.ready:  # it may have become ready since the last poll
            with contextlib.suppress(OSError, msgspec.DecodeError):
                self.closes = any(isinstance(answer, Ready) and answer.closes for answer in self.receive())
        busy = self.busy
        self.connection.close()
        if busy and self.closes:
            self.process.send_signal(signal.SIGINT)
        self._may_take = CLOSE_SECONDS if self.closes else 0.0 if busy else EXIT_SECONDS

    def wait(self, dropped: float) -> None:
        """Let it exit after `drop`, which was called at time `dropped` (`time.monotonic()`); kill it if it is late."""
        try:
            while self.process.poll() is None and (left := dropped + self._may_take - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(min(left, POLL_SECONDS))
                beat()
            if self.closes and self.process.poll() is None:
                print(
                    f"class {self.path!r} was not closed after {CLOSE_SECONDS:g} s, and its process is killed. Its "
                    "stack follows.",
                    file=sys.stderr,
                    flush=True,
                )
                self.show_traceback()
        finally:
            self.kill()

    def exit_reason(self) -> str:
        """A description of how it ended.

        Raises:
            TransientError: a preemption signal ended it.
        """
        code = self.process.returncode
        if self._disconnected and self._alive_when_disconnected:
            return "it closed the connection to the stage"
        if code in [-number for number in stopping.SIGNALS]:
            raise TransientError(f"the process of function {self.path!r} was ended by {signal.Signals(-code).name}.")
        if code == -signal.SIGKILL:
            return "it was killed by SIGKILL: by the system, if memory ran out (see dmesg), or by a user"
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
