"""Measures the driver's own time between stages, from the events of runs."""

import contextlib
import statistics
from collections.abc import Iterable, Mapping

from contracts.errors import UserError
from pipelines.config.run import RunConfig
from pipelines.insight.runs import runs_below
from pipelines.planning.simulation import DriverCosts
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, StagePublished, StageStarted


def local_driver_costs(config: RunConfig, runs: Iterable[RunDirectory] = ()) -> DriverCosts | None:
    """The driver's median time to start a stage, in the runs of the config's directory and others; None if unknown."""
    found = []
    for run in [*map(RunDirectory, runs_below(config.directory, 1)), *runs]:
        with contextlib.suppress(OSError, UserError):  # a damaged run does not count
            found.append(driver_costs(run.events()))
    starts = [costs.start for costs in found if costs is not None]
    return DriverCosts(statistics.median(starts)) if starts else None


def driver_costs(events: Iterable[Event], seconds: Mapping[str, float] | None = None) -> DriverCosts | None:
    """The mean seconds that the driver has taken to start a stage and to record its end, from the events of a run.

    They are means, because a run's duration depends on the sums. Time in which the driver had to wait does not count:
    the pause before a retry, the start of the stage that a streaming stage follows, and the work in progress when a
    stage ended.

    Args:
        events: the events of the run.
        seconds: the durations of the stages themselves, from the start of their process to its end. None: the predicted
            durations of stages include the driver's time at their end, as profiles do; it is then returned as 0.

    Returns:
        The costs; None where the events do not determine them.
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
