"""Listeners to the events of a run. Every module in this folder is one; there is no other registration.

A module has a function `listen(run, graph)` that returns a function of a list of events. The process that drives the
run (a driver, or the jobs of a detached run) calls it soon after something was recorded, most often with an empty list.
An exception is recorded, the listener is not called again, and the run goes on.
"""

import importlib
import pkgutil

from pipelines.execution.listeners import Listen
from pipelines.graph import Graph
from pipelines.run.directory import RunDirectory


def listeners_of(run: RunDirectory, graph: Graph) -> list[Listen]:
    """Start all listeners for one run."""
    names = [module.name for module in pkgutil.iter_modules(__path__, f"{__name__}.")]
    return [importlib.import_module(name).listen(run, graph) for name in names]
