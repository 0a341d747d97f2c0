"""`python -m tracking`: sends a run's metrics.jsonl to one tracker, until stdin ends.

The first line of stdin is the `TrackingTask`. The end of stdin means that no more points will come; it also ends when
the parent process dies.
"""

import os
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

import msgspec

from contracts import entrypoint
from contracts.files import write_atomically
from contracts.locks import locked
from contracts.points import METRICS, decode_points
from contracts.processes import kill_with_variable
from contracts.tailing import complete_lines, stdin_closed
from tracking.base import TrackedRun, Tracker
from tracking.task import MARK, TrackingTask, sent_file

POLL_SECONDS = 15.0
"""The interval between reads of the file: the cost of trackers is per call, not per metric."""
OFFLINE_SECONDS = 300.0
"""The interval for offline files, which nobody reads before they are uploaded. The tracker itself is opened only after
the first interval, because wandb's own process wakes up ten times a second while it exists."""


def main() -> int:
    """Send metrics until stdin ends. Returns the exit code."""
    entrypoint.importing()
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=TrackingTask)
    run = TrackedRun(task.run_id, task.name, Path(task.directory), task.config)
    module = import_module(f"tracking.{task.tracker}_tracker")
    run.tracking_directory.mkdir(exist_ok=True)
    # A process of an earlier command may still be sending.
    with locked(run.tracking_directory / f"{task.tracker}.lock"):
        kill_with_variable(f"{MARK}={os.environ[MARK]}")  # processes that its library left behind when it was killed
        ended, seconds = stdin_closed(), POLL_SECONDS
        if task.settings.get("mode") == "offline":
            seconds = OFFLINE_SECONDS
            ended.wait(seconds)
        tracker: Tracker = getattr(module, f"{task.tracker.capitalize()}Tracker")(run, task.settings)
        entrypoint.imported()
        offset = follow(run.directory / METRICS, tracker, ended, seconds)
        tracker.close()
        write_atomically(sent_file(run.directory, task.tracker), str(offset).encode())
    return 0


def follow(path: Path, tracker: Tracker, ended: threading.Event, seconds: float) -> int:
    """Send new points to a tracker every `seconds`. Returns the number of bytes of the file that were sent."""
    first = tracker.recorded()
    offset, last = 0, False
    while not last:
        last = ended.is_set()  # checked before the file is read, so that everything written until the end is sent
        content = complete_lines(path, offset)
        offset += len(content)
        if points := [point for point in decode_points(content) if point.point >= first]:
            tracker.log(points)
        if not last:
            ended.wait(seconds)
    return offset


if __name__ == "__main__":
    try:
        code = main()
    except Exception as error:
        traceback.print_exc()
        if "\n" in (message := str(error).strip()):  # the driver shows the last lines
            print(f"{type(error).__name__}: {message.splitlines()[0]}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # No thread of a library may keep the process alive, or print more after the error.
    os._exit(code)
