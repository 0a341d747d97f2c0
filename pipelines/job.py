"""The entry point of jobs on a cluster, next to pipelines/main.py.

submitit pickles it by name, so it imports as little as possible.
"""

import importlib
from typing import TYPE_CHECKING

from pipelines.execution.executors.base import JobEntry, JobTask

if TYPE_CHECKING:
    from pipelines.execution.listeners import Listen
    from pipelines.graph import Graph
    from pipelines.run.directory import RunDirectory


def perform(task: JobTask) -> None:
    """Run the task of a job."""
    importlib.import_module(task.module).perform(task, ENTRY)


def listeners(run: "RunDirectory", graph: "Graph") -> "list[Listen]":
    """The listeners of the events that a job records."""
    from pipelines.insight.listeners import listeners_of

    return listeners_of(run, graph)


ENTRY = JobEntry(perform, listeners)
