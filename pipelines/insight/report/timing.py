"""Computes how a run's time was spent, from its events and from the times that stages have measured themselves."""

import calendar
import contextlib
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from contracts.manifest import Manifest
from pipelines.graph import Node
from pipelines.insight.report.data import StageRow, TimeFacts
from pipelines.run.events import (
    Event,
    RunEnded,
    RunStarted,
    StageEvent,
    StageFailed,
    StagePublished,
    StageReused,
    StageStarted,
    StageSubmitted,
)

_REPLICAS = re.compile(r"^replicas: (\d+)$", re.MULTILINE)
LOADING = ("import", "load", "start", "startup")


def stage_row(node: Node, manifest: Manifest | None, events: Iterable[StageEvent]) -> StageRow:
    """State, times and provenance of a stage, from its manifest and from its own events.

    The times are those of its last attempt.
    """
    row = StageRow(
        name=node.name, kind=node.stage.name, iteration=node.iteration, role=node.role, state="waiting"
    )  # fmt: skip
    queued = False
    for event in events:
        if isinstance(event, StageSubmitted):
            row.begun, row.ended, queued = event.time, None, True
        elif isinstance(event, StageStarted):
            row.attempts += 1
            row.state = "begun"
            row.pool, row.given = event.pool, event.devices or []
            if not queued:  # also if no driver was left to record the end of the previous attempt
                row.begun, row.ended = event.time, None
            queued = False
        elif isinstance(event, StagePublished | StageFailed):
            row.ended = event.time
            row.state = "published" if isinstance(event, StagePublished) else "failed"
        elif isinstance(event, StageReused) and row.begun is None:
            row.detail = f"reused: {event.reason}"
    if manifest is not None:
        _set_measured(row, manifest)
    return row


def devices_of(node: Node, manifest: Manifest, attempt: Path | None) -> int:
    """The number of devices of a stage: by its own manifest, else by the config of its last attempt."""
    processes = manifest.facts.get("processes")
    if isinstance(processes, int):
        return processes
    replicas = node.stage.layout(node.config).processes
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = _REPLICAS.search((attempt / "stage.yaml").read_text("utf-8")) if attempt else None
        replicas = int(found[1]) if found else replicas
    return max(1, replicas) * max(1, node.gpus)


def _set_measured(row: StageRow, manifest: Manifest) -> None:
    seconds = manifest.seconds
    row.state = "published"
    row.total = max(0.0, seconds.get("total", 0.0) - seconds.get("wait", 0.0))  # it may have waited for streamed shards
    row.load = sum(seconds.get(name, 0.0) for name in LOADING)
    row.compute = seconds.get("compute", 0.0)
    if not row.compute and not row.load:
        row.compute = row.total
    row.other = max(0.0, row.total - row.load - row.compute)
    if row.begun is None:  # computed by another run, or by a command whose events are lost
        created = calendar.timegm(time.strptime(manifest.created, "%Y-%m-%dT%H:%M:%SZ"))
        row.begun, row.ended = created - row.total, float(created)
        row.detail = row.detail or "computed by another run or command"
    elif row.ended is not None:
        row.wait = max(0.0, row.ended - row.begun - row.total)
    facts = manifest.facts
    tokens = facts.get("response_tokens", facts.get("tokens"))
    row.tokens = tokens if isinstance(tokens, int) else None
    row.rows, row.key, row.digest, row.weights = manifest.rows, manifest.key, manifest.digest, manifest.weights
    row.created, row.versions, row.hardware, row.inputs = (
        manifest.created, manifest.versions, manifest.hardware, manifest.inputs,
    )  # fmt: skip


def time_facts(rows: list[StageRow], events: list[Event]) -> TimeFacts:
    """Totals over the stages that this run has computed itself, without artifacts reused from other runs."""
    own = [row for row in rows if row.total is not None and row.wait is not None]
    by_role: dict[str, float] = {}
    tokens: dict[str, tuple[int, float]] = {}
    for row in own:
        spent = (row.total or 0.0) + (row.wait or 0.0)
        by_role[row.role] = by_role.get(row.role, 0.0) + spent
        if row.tokens and row.compute:
            count, seconds = tokens.get(row.role, (0, 0.0))
            tokens[row.role] = (count + row.tokens, seconds + row.compute)
    return TimeFacts(
        wall=_wall(events),
        stages=sum(by_role.values()),
        device_hours=sum((row.total or 0.0) * row.devices for row in own) / 3600,
        load=sum(row.load or 0.0 for row in own),
        compute=sum(row.compute or 0.0 for row in own),
        wait=sum(row.wait or 0.0 for row in own),
        other=sum(row.other or 0.0 for row in own),
        held=sum(row.held or 0.0 for row in own),
        idle=_idle(own, _wall(events)),
        by_role=dict(sorted(by_role.items(), key=lambda item: -item[1])),
        tokens_per_second={role: count / seconds for role, (count, seconds) in tokens.items()},
    )


def set_held_times(rows: Iterable[StageRow], needs: Mapping[str, Iterable[str]], events: Iterable[Event]) -> None:
    """Set `held` of each stage: the seconds that it waited for devices after its inputs were complete.

    Args:
        rows: all stages, which are changed.
        needs: by stage, the stages that it reads.
        events: the run's events; no stage could start before the command that started it.
    """
    known = {row.name: row for row in rows}
    begins = sorted(event.time for event in events if isinstance(event, RunStarted))
    for row in known.values():
        ends = [known[need].ended for need in needs.get(row.name, ()) if need in known]
        if row.begun is None or row.wait is None or None in ends:
            continue
        command = next((time for time in reversed(begins) if time <= row.begun), row.begun)
        row.held = max(0.0, row.begun - max([command, *(end for end in ends if end is not None)]))


def _idle(rows: list[StageRow], wall: float | None) -> dict[str, float]:
    devices: dict[str, set[int]] = {}
    work: dict[str, float] = {}
    for row in rows:
        if row.given:
            devices.setdefault(row.pool, set()).update(row.given)
            work[row.pool] = work.get(row.pool, 0.0) + ((row.total or 0.0) + (row.wait or 0.0)) * len(row.given)
    return {pool: max(0.0, 1 - work[pool] / (len(held) * wall)) for pool, held in devices.items() if wall}


def _wall(events: list[Event]) -> float | None:
    """Seconds in which commands worked on the run; None where that is not known."""
    total, since, last = 0.0, None, None
    for event in events:
        if not event.time:
            continue
        if isinstance(event, RunStarted):
            if since is not None and last is not None:
                total += last - since  # the previous command was killed
            since = event.time
        last = event.time
        if isinstance(event, RunEnded) and since is not None:
            total += event.time - since
            since = None
    if since is not None and last is not None:
        total += last - since
    return total or None
