"""What the driver itself takes between stages, by the events of runs."""

import contextlib
import statistics
from collections.abc import Iterable, Mapping

from contracts.errors import UserError
from pipelines.config.run import RunConfig
from pipelines.insight.runs import runs_below
from pipelines.planning.simulation import DriverCosts
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, StagePublished, StageStarted


def costs_here(config: RunConfig, runs: Iterable[RunDirectory] = ()) -> DriverCosts | None:
    """What the driver took between stages in the runs of this directory, and in others; None where there are none."""
    found = []
    for run in [*map(RunDirectory, runs_below(config.directory, 1)), *runs]:
        with contextlib.suppress(OSError, UserError):  # a damaged run says nothing
            found.append(driver_costs(run.events()))
    starts = [costs.start for costs in found if costs is not None]
    return DriverCosts(statistics.median(starts)) if starts else None


def driver_costs(events: Iterable[Event], seconds: Mapping[str, float] | None = None) -> DriverCosts | None:
    """What the driver has taken to start stages and to take note of their ends, by the events of a run.

    Of each the mean, because a run is as long as their sum. What it waited for meanwhile does not count: the pause
    before a further attempt, the start of a stage that another one follows, what it had in hand when a stage ended.

    Args:
        events: of the run.
        seconds: what the stages themselves have taken, from the start of their process to its end; None: what is
            predicted of stages has the driver's part of their end in it (as profiles have).

    Returns:
        None where the events do not say.
    """
    starts, ends = [], [0.0] if seconds is None else []
    begun: dict[str, float] = {}
    before: Event | None = None
    for event in events:
        match event:
            case StageStarted(stage=stage):
                waits = stage in begun or event.reason.startswith("follows ")
                if isinstance(before, StageStarted | StagePublished) and not waits:
                    starts.append(event.time - before.time)
                begun[stage] = event.time
            case StagePublished(stage=stage) if seconds is not None and stage in begun and seconds.get(stage):
                busy_until = before.time if before is not None else 0.0
                ends.append(event.time - max(begun[stage] + seconds[stage], busy_until))
            case _:
                pass
        before = event
    if not starts or not ends:
        return None
    return DriverCosts(max(0.0, statistics.fmean(starts)), max(0.0, statistics.fmean(ends)))
