"""`python -m pipelines.insight.hooks`: calls the user's function for what happens in a run, until stdin ends.

The first line of stdin is the `HookTask`. Progress is kept on the disk: after a kill, the next process continues with
what is missing, and repeats the one happening whose call was interrupted.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from contracts.callables import load_callable
from contracts.errors import UserError
from contracts.locks import locked
from contracts.points import METRICS, decode_points
from contracts.tailing import complete_lines, stdin_closed
from pipelines.insight.hooks.happenings import Happening, Happenings, OwnStages, in_words, point_happening
from pipelines.insight.hooks.task import HookTask, Progress, ProgressFile
from pipelines.run.events import FILE, EventStream, HookFailed, decode_events

POLL_SECONDS = 1.0
EXTRA_SECONDS = 5.0
"""Seconds after the grace period of the hook until a function that hangs is killed with this process."""


def main() -> int:
    """Run the hook, and return the exit code."""
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=HookTask)
    run = Path(task.run)
    os.nice(5)  # the stages come first
    ended = stdin_closed()
    threading.Thread(target=_end_after, args=(ended, task.grace_seconds), daemon=True).start()
    with locked(run / "hooks" / f"{task.hook}.lock"):  # a process of an earlier command may still be calling it
        try:
            function = load_callable(task.function)
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        HookRunner(task, function, Progress.of(run, task.hook) or Progress.now(run)).follow(ended)
    return 0


def _end_after(ended: threading.Event, seconds: float) -> None:
    """Kill this process and its children if it is still running some time after its stdin has ended."""
    ended.wait()
    time.sleep(seconds + EXTRA_SECONDS)
    print(
        f"it did not return within {seconds:g} s after the command had ended, and was ended",
        file=sys.stderr,
        flush=True,
    )
    os.killpg(0, signal.SIGKILL)


class HookRunner:
    """Calls a function with everything that happens in a run."""

    def __init__(self, task: HookTask, function: Callable[..., Any], progress: Progress) -> None:
        self._task = task
        self._run = Path(task.run)
        self._function = function
        self._progress = progress
        self._file = ProgressFile(self._run, task.hook, progress)
        self._happenings = Happenings(self._run, task.evaluated)
        self._own_stages = OwnStages(self._run)
        self._failures = 0
        for event in decode_events(complete_lines(self._run / FILE, 0)[: progress.events]):
            for _ in self._happenings.of(event):
                pass  # the function was called for it, or it was before this hook

    def follow(self, ended: threading.Event) -> None:
        """Call the function for what is new until the input ends, then for the rest."""
        last = False
        while not last:
            last = ended.wait(POLL_SECONDS)  # before the files are read, so that the last pass reads all
            for line in complete_lines(self._run / METRICS, self._progress.metrics).splitlines(keepends=True):
                points = filter(self._own_stages.computed, decode_points(line))
                found = (happening for point in points if (happening := point_happening(point)))
                self._progress.metrics += len(line)
                self._call_for(found)
            for line in complete_lines(self._run / FILE, self._progress.events).splitlines(keepends=True):
                found = (happening for event in decode_events(line) for happening in self._happenings.of(event))
                self._progress.events += len(line)
                self._call_for(found)
        self._file.write(self._progress)

    def _call_for(self, happenings: Iterator[Happening]) -> None:
        """Call the function for the kinds that the hook wants, and save the progress where there was a call."""
        wanted = [happening for happening in happenings if happening["kind"] in self._task.kinds]
        for happening in wanted:
            self._call(self._happenings.complete(happening))
        if wanted:
            self._file.write(self._progress)

    def _call(self, happening: Happening) -> None:
        try:
            self._function(happening, self._run, **self._task.settings)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: the process goes on
            print(f"failed on {in_words(happening)}", file=sys.stderr)
            traceback.print_exc()
            self._failures += 1
            if self._failures == 1:
                self._record(f"on {in_words(happening)}: {type(error).__name__}: {error}")
        sys.stdout.flush()

    def _record(self, text: str) -> None:
        log = self._run / "logs" / "hooks" / f"{self._task.hook}.log"
        with contextlib.suppress(OSError):  # a full disk, which the run itself reports
            EventStream(self._run / FILE).append(
                HookFailed(hook=self._task.hook, error=f"{text} (it is still called for what follows; {log})")
            )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads that the user's function has started
