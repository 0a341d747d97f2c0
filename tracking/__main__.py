"""`python -m tracking`: feed one tracker from a run's metrics.jsonl, until stdin ends.

The first line of stdin says which (`TrackingTask`); its end, by whatever end of the process that has started this one,
that no more points come.
"""

import os
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

import msgspec

from contracts import surroundings
from contracts.files import write_atomically
from contracts.locks import locked
from contracts.points import METRICS, decode_points
from contracts.processes import end_marked
from contracts.tailing import end_of_input, whole_lines
from tracking.base import TrackedRun, Tracker
from tracking.task import MARK, TrackingTask, sent_file

POLL_SECONDS = 15.0
"""How often the file is looked at: trackers pay for each time that something is logged, not for how much."""
OFFLINE_SECONDS = 300.0
"""The same for files that nobody looks at before they are uploaded. The tracker is not opened before either: wandb's
own process wakes up ten times a second, as long as it is there."""


def main() -> int:
    """Returns the exit code."""
    surroundings.importing()
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=TrackingTask)
    run = TrackedRun(task.run_id, task.name, Path(task.directory), task.config)
    module = import_module(f"tracking.{task.tracker}_tracker")
    run.own.mkdir(exist_ok=True)
    with locked(run.own / f"{task.tracker}.lock"):  # perhaps a process of an earlier command still sends
        end_marked(f"{MARK}={os.environ[MARK]}")  # its library's own, where it was killed
        ended, seconds = end_of_input(), POLL_SECONDS
        if task.settings.get("mode") == "offline":
            seconds = OFFLINE_SECONDS
            ended.wait(seconds)
        tracker: Tracker = getattr(module, f"{task.tracker.capitalize()}Tracker")(run, task.settings)
        surroundings.imported()
        offset = follow(run.directory / METRICS, tracker, ended, seconds)
        tracker.close()
        write_atomically(sent_file(run.directory, task.tracker), str(offset).encode())
    return 0


def follow(path: Path, tracker: Tracker, ended: threading.Event, seconds: float) -> int:
    """Feed a tracker every `seconds` with what it does not have yet; returns how many bytes of the file it has."""
    first = tracker.recorded()
    offset, last = 0, False
    while not last:
        last = ended.is_set()  # before the file is read: what was written until then is sent
        content = whole_lines(path, offset)
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
        if "\n" in (said := str(error).strip()):  # the driver tells the last lines
            print(f"{type(error).__name__}: {said.splitlines()[0]}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # No library's thread may keep it, or say more behind the error.
    os._exit(code)
