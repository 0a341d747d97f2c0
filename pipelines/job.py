"""What a job on a cluster runs: the entry point beside pipelines/main.py.

submitit passes it on by its name, so it imports as little as it can.
"""

import importlib
from typing import TYPE_CHECKING

from pipelines.execution.executors.base import Entry, JobTask

if TYPE_CHECKING:
    from pipelines.execution.listeners import Listen
    from pipelines.graph import Graph
    from pipelines.run.directory import RunDirectory


def perform(task: JobTask) -> None:
    """Do what a job is for."""
    importlib.import_module(task.module).perform(task, ENTRY)


def listeners(run: "RunDirectory", graph: "Graph") -> "list[Listen]":
    """Those who are told what a job records."""
    from pipelines.insight.listeners import listeners_of

    return listeners_of(run, graph)


ENTRY = Entry(perform, listeners)
