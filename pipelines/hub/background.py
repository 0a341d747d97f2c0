"""Pushing while a run goes on: a process of its own beside whoever drives it, which neither waits for it nor needs it.

It can be killed at any instant, and so can the driver. The end of its stdin tells it that the driver has ended, in
whatever way; it pushes what is there, and ends.
"""

import os
import sys
from pathlib import Path

from contracts import surroundings
from contracts.tailing import end_of_input
from pipelines.config.sections import HubSection
from pipelines.run.directory import RunDirectory
from pipelines.run.events import FILE, RunEnded, RunStarted

POLL_SECONDS = 1.0
LAST_PATIENCE = 60.0
"""Seconds at most that something is tried again in when the driver has ended."""


def command(run: RunDirectory) -> list[str]:
    """The command that pushes a run while it goes on."""
    return [sys.executable, "-P", "-m", "pipelines.hub", str(run.path)]


def follow(path: Path) -> None:
    """Push what a run publishes, until stdin ends. What goes wrong with it is told in the run's events."""
    run = RunDirectory(path)
    section = run.config.pushes
    if section is not None:
        os.nice(5)
        _follow(run, section)


def _follow(run: RunDirectory, section: HubSection) -> None:
    from pipelines.hub.push import Pusher  # with the library of the Hub

    surroundings.imported()
    ended = end_of_input()

    def patience() -> float:
        return min(section.patience_seconds, LAST_PATIENCE) if ended.is_set() else section.patience_seconds

    pusher = Pusher(run, section, patience)
    seen, last = -1, False
    with pusher.alone():
        while not last:
            last = ended.wait(POLL_SECONDS)
            size = (run.path / FILE).stat().st_size
            if last or size != seen:
                failed = [found for found in pusher.push(known=True) if found.state == "failed" and not found.lasts]
                seen = -1 if failed else size  # an outage may be over soon
        if _has_ended(run):
            for _ in pusher.report():
                pass


def _has_ended(run: RunDirectory) -> bool:
    """Whether the run has come to an end of its own, as far as its events tell."""
    ends = [event for event in run.events() if isinstance(event, RunStarted | RunEnded)]
    return bool(ends) and isinstance(ends[-1], RunEnded) and ends[-1].outcome != "interrupted"
