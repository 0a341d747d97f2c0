"""Pushes a run while it is in progress, in a separate process that the driver neither waits for nor depends on.

Both processes can be killed at any instant. When the driver ends, for any reason, this process sees the end of its
stdin; it then pushes what is published, and exits.
"""

import os
import sys
from pathlib import Path

from contracts import entrypoint
from contracts.tailing import stdin_closed
from pipelines.config.sections import HubSection
from pipelines.run.directory import RunDirectory
from pipelines.run.events import FILE, RunEnded, RunStarted

POLL_SECONDS = 1.0
FINAL_PATIENCE = 60.0
"""Upper limit in seconds on retrying a request once the driver has ended."""


def command(run: RunDirectory) -> list[str]:
    """The command line of the process that pushes a run in the background."""
    return [sys.executable, "-P", "-m", "pipelines.hub", str(run.path)]


def follow(path: Path) -> None:
    """Push what a run publishes, until stdin ends. Failures are recorded in the run's events."""
    run = RunDirectory(path)
    section = run.config.hub_repos
    if section is not None:
        os.nice(5)
        _follow(run, section)


def _follow(run: RunDirectory, section: HubSection) -> None:
    from pipelines.hub.push import Pusher  # imports huggingface_hub

    entrypoint.imported()
    ended = stdin_closed()

    def patience() -> float:
        return min(section.patience_seconds, FINAL_PATIENCE) if ended.is_set() else section.patience_seconds

    pusher = Pusher(run, section, patience)
    seen, last = -1, False
    with pusher.exclusive():
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
    """Whether the run's last command has ended, other than by an interruption."""
    ends = [event for event in run.events() if isinstance(event, RunStarted | RunEnded)]
    return bool(ends) and isinstance(ends[-1], RunEnded) and ends[-1].outcome != "interrupted"
