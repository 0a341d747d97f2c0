"""What happened to jobs on the cluster, as accounting tells it afterwards."""

import json
from pathlib import Path

from contracts.artifacts import write_atomically
from pipelines.slurm import scheduler

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
    records = scheduler.settled_history(tasks, 0.0 if published else 10.0)
    rows = [{name: getattr(record, name) for name in record.__struct_fields__} for record in records]
    write_atomically(attempt / "accounting.json", json.dumps(rows, indent=1).encode())
    return [
        {"job": record.id, "state": record.state, "nodes": record.nodes, "code": record.code, "end": record.end}
        for record in records
        if record.word in WORDS
    ]


def in_words(event: dict[str, str]) -> str:
    """One event for people."""
    what = WORDS[event["state"].split()[0]]
    by = event["state"].partition(" ")[2]
    code = f", exit code {event['code'].partition(':')[0]}" if what == "failed" else ""
    return f"job {event['job']} on {event['nodes']}: {what}{f' {by}' if by else ''}{code}"
