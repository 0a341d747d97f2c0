"""Derives the events of jobs that ended abnormally from Slurm's accounting."""

import json
import sys
from datetime import datetime
from pathlib import Path

from contracts.files import write_atomically
from pipelines.execution.executors.slurm import scheduler
from pipelines.execution.executors.slurm.jobs import RECORD, Jobs, jobs_of
from pipelines.execution.executors.slurm.scheduler import SchedulerError
from pipelines.run.directory import RunDirectory
from pipelines.run.events import JobEnded

ACCOUNTING = "accounting.json"
ACCOUNTING_PATIENCE = 60.0
"""Seconds to keep asking an accounting that does not answer; no decision depends on it."""

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
"""Wording of the states that a report shows; jobs that ended well are not shown."""


def job_events(stage: str, attempt: Path, tasks: dict[str, int], *, published: bool) -> list[JobEnded]:
    """Events of the jobs of an ended attempt; their records are saved as accounting.json next to its logs.

    If accounting does not answer, the run continues; without the file, later commands ask again.

    Args:
        tasks: number of tasks by job id.
        published: whether the attempt succeeded. If so, it does not wait for records that lag behind: events before the
            success are older.
    """
    seconds, patience = (0.0, 0.0) if published else (scheduler.ACCOUNTING_LAG_SECONDS, ACCOUNTING_PATIENCE)
    try:
        records = scheduler.complete_history(tasks, seconds, patience)
    except SchedulerError as error:
        print(f"the history of the jobs {', '.join(tasks)} is not known yet: {error}", file=sys.stderr)
        return []
    return _save(stage, attempt, records)


def _save(stage: str, attempt: Path, records: list[scheduler.JobRecord]) -> list[JobEnded]:
    rows = [{name: getattr(record, name) for name in record.__struct_fields__} for record in records]
    write_atomically(attempt / ACCOUNTING, json.dumps(rows, indent=1).encode())
    return _events(stage, records)


def _events(stage: str, records: list[scheduler.JobRecord]) -> list[JobEnded]:
    return [
        JobEnded(
            stage=stage,
            job=record.id,
            text=_in_words(record),
            ended=_timestamp(record.end),
            requeued=record.state == "REQUEUED",
            cancelled=record.word == "CANCELLED",
        )
        for record in records
        if record.word in WORDS and record.state != "CANCELLED"  # cancelled by Slurm because a dependency failed
    ]


def _timestamp(end: str) -> float | None:
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:  # not ended
        return None


def _in_words(record: scheduler.JobRecord) -> str:
    what = WORDS[record.word]
    by = record.state.partition(" ")[2]
    code = f", exit code {record.code.partition(':')[0]}" if what == "failed" else ""
    where = "before it started" if record.nodes == "None assigned" else f"on {record.nodes}"
    return f"job {record.id} {where}: {what}{f' {by}' if by else ''}{code}"


def unaccounted(run: RunDirectory, live: set[str]) -> dict[Path, Jobs]:
    """The attempts whose jobs have ended but whose accounting was never saved."""
    attempts = [path.parent for path in sorted((run.path / "logs").rglob(RECORD))]
    missing = {path: jobs for path in attempts if not (path / ACCOUNTING).exists() and (jobs := jobs_of(path))}
    return {path: jobs for path, jobs in missing.items() if not live.intersection(jobs.ids)}


def record_missed(run: RunDirectory, live: set[str]) -> None:
    """Record the events of jobs that ended without a driver or finishing job, before a run continues."""
    found = unaccounted(run, live)
    records = scheduler.complete_history({id: count for jobs in found.values() for id, count in jobs.tasks.items()})
    for attempt, jobs in found.items():
        of_attempt = [record for record in records if record.base in jobs.ids]
        for event in _save(run.stage_of(attempt), attempt, of_attempt):
            run.record(event)


def missed_events(run: RunDirectory, live: set[str], patience: float) -> list[JobEnded]:
    """The events that `record_missed` would record, without recording them.

    Raises:
        UserError: accounting has not answered for `patience` seconds, or there is none here.
    """
    found = unaccounted(run, live)
    records = scheduler.history([id for jobs in found.values() for id in jobs.ids], patience)
    return [
        event
        for attempt, jobs in found.items()
        for event in _events(run.stage_of(attempt), [record for record in records if record.base in jobs.ids])
    ]
