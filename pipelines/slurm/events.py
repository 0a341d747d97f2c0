"""What happened to jobs on the cluster, as accounting tells it afterwards."""

import json
from pathlib import Path
from typing import Any

from contracts.artifacts import write_atomically
from pipelines.graph import Graph
from pipelines.rundir import RunDirectory
from pipelines.slurm import scheduler
from pipelines.slurm.jobs import Jobs, unfinished_jobs

ACCOUNTING = "accounting.json"

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

    Args:
        tasks: how many tasks a job has, by its id.
        published: the attempt was successful. Then nobody waits for accounting, which is a second late: what happened
            on the way is longer ago.
    """
    return _note(attempt, scheduler.settled_history(tasks, 0.0 if published else 10.0))


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


def unaccounted(run: RunDirectory, graph: Graph, live: set[str]) -> dict[str, tuple[Path, Jobs]]:
    """The stages whose latest jobs have ended without anybody having looked what had happened to them."""
    found = {}
    for name, jobs in unfinished_jobs(run, graph).items():
        attempt = run.attempts(name)[-1]
        if not live.intersection(jobs.ids) and not (attempt / ACCOUNTING).exists():
            found[name] = (attempt, jobs)
    return found


def record_missed(run: RunDirectory, graph: Graph, live: set[str]) -> None:
    """Before a run goes on: take note of what happened to jobs that ended without a driver or a finishing job."""
    found = unaccounted(run, graph, live)
    records = scheduler.settled_history({id: count for _, jobs in found.values() for id, count in jobs.tasks.items()})
    for name, (attempt, jobs) in found.items():
        for event in _note(attempt, [record for record in records if record.base in jobs.ids]):
            run.record("slurm", stage=name, **event)


def missed(run: RunDirectory, graph: Graph, live: set[str]) -> list[dict[str, Any]]:
    """The same, without taking note of it."""
    found = unaccounted(run, graph, live)
    records = scheduler.history([id for _, jobs in found.values() for id in jobs.ids])
    return [
        {"event": "slurm", "stage": name, **event}
        for name, (_, jobs) in found.items()
        for event in _events([record for record in records if record.base in jobs.ids])
    ]


def in_words(event: dict[str, str]) -> str:
    """One event for people."""
    what = WORDS[event["state"].split()[0]]
    by = event["state"].partition(" ")[2]
    code = f", exit code {event['code'].partition(':')[0]}" if what == "failed" else ""
    where = "before it started" if event["nodes"] == "None assigned" else f"on {event['nodes']}"
    return f"job {event['job']} {where}: {what}{f' {by}' if by else ''}{code}"
