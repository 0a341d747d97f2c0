"""Listeners to the events of a run: one module of this folder each, found by being here.

A module has a function `listen(run, graph)` that returns a function of a list of events. It is called by whoever
drives the run (a driver, or the jobs of a detached run), soon after something was recorded; most often with an empty
list. What it raises is recorded, it is told nothing more, and the run goes on.
"""

import importlib
import pkgutil

from pipelines.execution.listeners import Listen
from pipelines.graph import Graph
from pipelines.run.directory import RunDirectory


def listeners_of(run: RunDirectory, graph: Graph) -> list[Listen]:
    """All listeners, for one run."""
    names = [module.name for module in pkgutil.iter_modules(__path__, f"{__name__}.")]
    return [importlib.import_module(name).listen(run, graph) for name in names]
