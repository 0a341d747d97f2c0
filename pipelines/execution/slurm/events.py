"""What happened to jobs on the cluster, as accounting tells it afterwards."""

import json
import sys
from pathlib import Path
from typing import Any

from contracts.files import write_atomically
from pipelines.execution.slurm import scheduler
from pipelines.execution.slurm.jobs import RECORD, Jobs, jobs_of
from pipelines.execution.slurm.scheduler import SchedulerError
from pipelines.run.directory import RunDirectory

ACCOUNTING = "accounting.json"
ACCOUNTING_PATIENCE = 60.0
"""Seconds for which an accounting that does not answer is asked again: what it says decides nothing."""

WORDS = {
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "preempted",
    "REQUEUED": "requeued",
    "TIMEOUT": "ended at its time limit",
    "OUT_OF_MEMORY": "ended because its memory ran out",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "ended at its deadline",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
}
"""States that a report tells, in words; not that a job ended well."""


def events_of(attempt: Path, tasks: dict[str, int], *, published: bool) -> list[dict[str, str]]:
    """What happened to the jobs of an attempt that has ended; kept in accounting.json beside its logs.

    A run does not wait for an accounting that does not answer: without this file, later commands ask it again.

    Args:
        tasks: how many tasks a job has, by its id.
        published: the attempt was successful. Then nobody waits for accounting, which is a second late: what happened
            on the way is longer ago.
    """
    seconds, patience = (0.0, 0.0) if published else (scheduler.SETTLING_SECONDS, ACCOUNTING_PATIENCE)
    try:
        records = scheduler.settled_history(tasks, seconds, patience)
    except SchedulerError as error:
        print(f"what happened to the jobs {', '.join(tasks)} is not known yet: {error}", file=sys.stderr)
        return []
    return _note(attempt, records)


def _note(attempt: Path, records: list[scheduler.Record]) -> list[dict[str, str]]:
    rows = [{name: getattr(record, name) for name in record.__struct_fields__} for record in records]
    write_atomically(attempt / ACCOUNTING, json.dumps(rows, indent=1).encode())
    return _events(records)


def _events(records: list[scheduler.Record]) -> list[dict[str, str]]:
    return [
        {"job": record.id, "state": record.state, "nodes": record.nodes, "code": record.code, "end": record.end}
        for record in records
        if record.word in WORDS and record.state != "CANCELLED"  # by Slurm itself, since what it waited for failed
    ]


def unaccounted(run: RunDirectory, live: set[str]) -> dict[Path, Jobs]:
    """The attempts whose jobs have ended without anybody having learned what had happened to them."""
    attempts = [path.parent for path in sorted((run.path / "logs").rglob(RECORD))]
    missing = {path: jobs for path in attempts if not (path / ACCOUNTING).exists() and (jobs := jobs_of(path))}
    return {path: jobs for path, jobs in missing.items() if not live.intersection(jobs.ids)}


def record_missed(run: RunDirectory, live: set[str]) -> None:
    """Before a run goes on: take note of what happened to jobs that ended without a driver or a finishing job."""
    found = unaccounted(run, live)
    records = scheduler.settled_history({id: count for jobs in found.values() for id, count in jobs.tasks.items()})
    for attempt, jobs in found.items():
        for event in _note(attempt, [record for record in records if record.base in jobs.ids]):
            run.record("slurm", stage=run.stage_of(attempt), **event)


def missed(run: RunDirectory, live: set[str], patience: float) -> list[dict[str, Any]]:
    """The same, without taking note of it.

    Raises:
        UserError: accounting has not answered for `patience` seconds, or there is none here.
    """
    found = unaccounted(run, live)
    records = scheduler.history([id for jobs in found.values() for id in jobs.ids], patience)
    return [
        {"event": "slurm", "stage": run.stage_of(attempt), **event}
        for attempt, jobs in found.items()
        for event in _events([record for record in records if record.base in jobs.ids])
    ]


def in_words(event: dict[str, str]) -> str:
    """One event for people."""
    what = WORDS[event["state"].split()[0]]
    by = event["state"].partition(" ")[2]
    code = f", exit code {event['code'].partition(':')[0]}" if what == "failed" else ""
    where = "before it started" if event["nodes"] == "None assigned" else f"on {event['nodes']}"
    return f"job {event['job']} {where}: {what}{f' {by}' if by else ''}{code}"
