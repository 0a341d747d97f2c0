"""Puts the events of a run into words: for the live output, and for reports."""

import time
from collections.abc import Iterable

from pipelines.config.run import RunConfig
from pipelines.run.events import (
    Event,
    GateDecided,
    HookFailed,
    HubPushed,
    HubPushFailed,
    JobEnded,
    JobRequeued,
    JobRestarted,
    ListenerFailed,
    RetentionFailed,
    RetentionHeld,
    RunCancelled,
    RunEnding,
    SourceChanged,
    StageEvent,
    StageFailed,
    StageInvalidated,
    StagePublished,
    StageReused,
    StageStarted,
    StageWaits,
    TrackerFailed,
    Unreadable,
    WeightsReleased,
)
from pipelines.text import format_megabytes, format_ranges, plural, printable

WATCHED = ("loss", "reward", "accuracy", "margin", "score_mean", "response_length", "grad_norm", "tokens_per_second")
"""Metrics of a running stage to show, by priority."""
MAX_WATCHED = 3


def live_line(event: Event) -> str | None:
    """The line that is printed when an event happens; None for events that are not printed."""
    match event:
        case StageStarted():
            where = place_in_words(event)
            return f"run    {event.stage}  ({event.reason}{where and f'; {where}'})"
        case StageReused():
            return f"reuse  {event.stage}  ({event.reason})"
        case StagePublished():
            return f"done   {event.stage}  {event.seconds:.1f} s, {event.ledger}"
        case GateDecided():
            return f"gate   {event.stage}  ({event.text})"
        case StageFailed(retry_in=None):
            return f"FAILED {event.stage}"
        case StageFailed():
            return f"retry  {event.stage}  ({event.how.rstrip('.')}; once more in {event.retry_in:.0f} s)"
        case StageInvalidated():
            return f"again  {event.stage}  ({event.reason})"
        case StageWaits():
            return f"waits  {event.stage}  ({event.text})"
        case JobEnded():
            return f"job    {event.stage}  ({event.text})"
        case RunEnding():
            names, grace = ", ".join(event.stages), event.grace_seconds
            return f"ending {names}  (up to {grace:g} s to finish work in progress; interrupt again to end at once)"
        case WeightsReleased():
            return f"release {event.stage}  ({event.reason}; {format_megabytes(event.bytes)} are free)"
        case RetentionHeld():
            return f"keep   {event.reason}; nothing of it is deleted or compressed"
        case RetentionFailed():
            return f"warning: {event.what} failed, and the run goes on: {printable(event.error)}"
        case ListenerFailed():
            error = printable(event.error)
            return f"warning: the listener {event.listener} failed and is not called again; the run goes on: {error}"
        case HubPushed():
            return f"pushed {event.what} to {event.repo}"
        case HubPushFailed():
            return f"warning: {event.what} is not on the Hub yet, and the run goes on: {printable(event.error)}"
        case TrackerFailed():
            return f"warning: {_tracker_failure(event)}"
        case HookFailed():
            return f"warning: {_hook_failure(event)}"
        case _:
            return None


def metrics_in_words(metrics: dict[str, float]) -> str:
    """The most important metrics of a step or shard, in words."""
    chosen = [name for name in WATCHED if name in metrics][:MAX_WATCHED]
    return ", ".join(f"{name.replace('_per_second', '/s').replace('_', ' ')} {metrics[name]:.3g}" for name in chosen)


def place_in_words(event: StageStarted) -> str:
    """The pool and the exclusive devices of a stage, in words; empty where it shares its devices."""
    found = [f"pool {event.pool}"] if event.pool else []
    if event.devices:
        found.append(f"device{'s' * (len(event.devices) > 1)} {format_ranges(event.devices)}")
    return ", ".join(found)


def is_good_news(event: Event) -> bool:
    """Whether an event reports that all is well, so that `--quiet` leaves it out."""
    return isinstance(event, StageStarted | StageReused | StagePublished | WeightsReleased | HubPushed)


def of_current_config(events: Iterable[Event], config: RunConfig) -> list[Event]:
    """The events, without failures of hooks and trackers that are no longer in the config."""
    hooks, trackers = config.hooks, config.tracking.chosen
    return [
        event
        for event in events
        if not (isinstance(event, HookFailed) and event.hook not in hooks)
        and not (isinstance(event, TrackerFailed) and event.tracker not in trackers)
    ]


def notable_lines(events: Iterable[Event]) -> list[str]:
    """Lines on everything unusual in a run, by time: transient failures, retries, requeues, jobs that failed."""
    events = list(events)
    explained = {event.job for event in events if isinstance(event, JobRequeued)}
    cancelled = {id for event in events if isinstance(event, RunCancelled) for id in event.jobs}
    lines: dict[str, None] = {}
    for event in events:
        if isinstance(event, JobEnded) and (
            (event.cancelled and event.job.partition("_")[0] in cancelled)
            or (event.requeued and event.job in explained)
        ):
            continue  # the event of `pipeline cancel`, or of the job itself, reports it
        if (text := _notable(event)) is not None:
            when = event.ended if isinstance(event, JobEnded) and event.ended else event.time
            about = event.stage if isinstance(event, StageEvent) else "the run"
            lines[f"{time.strftime('%F %T', time.localtime(when))}  {about}: {text}"] = None
    unread = sum(isinstance(event, Unreadable) for event in events)
    left_out = f"{plural(unread, 'line')} of events.jsonl cannot be read and left out here; the results are unaffected."
    return sorted(lines) + ([left_out] if unread else [])


def _notable(event: Event) -> str | None:
    match event:
        case JobEnded():
            return event.text
        case JobRequeued():
            return f"job {event.job} on {event.host}: saved what it had and was requeued ({event.reason})"
        case JobRestarted():
            ended = f"job {event.job} on {event.host}: its process ended with exit code {event.code}"
            return f"{ended}, and was started again"
        case StageFailed(retry_in=None):
            return f"{event.attempt} {event.how} Not retried."
        case StageFailed():
            return f"{event.attempt} {event.how} Retried after {event.retry_in:.0f} s."
        case GateDecided():
            return event.text
        case SourceChanged():
            return f"computed by Ratchet's source {event.ran}; it was {event.asked} when the stage was requested"
        case RunCancelled():
            return f"cancelled by {event.by} with `pipeline cancel`"
        case ListenerFailed():
            return f"the listener {event.listener} failed: {printable(event.error)}"
        case HubPushFailed():
            return f"{event.what} could not be pushed: {printable(event.error)}"
        case TrackerFailed():
            return _tracker_failure(event)
        case HookFailed():
            return _hook_failure(event)
        case _:
            return None


def _tracker_failure(event: TrackerFailed) -> str:
    return f"the tracker {event.tracker} failed; the next command sends it the rest: {printable(event.error)}"


def _hook_failure(event: HookFailed) -> str:
    return f"the hook {event.hook} failed: {printable(event.error)}"
