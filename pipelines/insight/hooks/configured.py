"""Sets up the hooks of a run's config: their first progress, the policies they are called for, and their checks."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

from contracts.callable_check import Call, mistake_in
from contracts.errors import UserError
from pipelines.config.run import RunConfig
from pipelines.graph import Graph
from pipelines.insight.hooks.task import EvaluatedPolicy, Progress

ARGUMENTS = ("happening", "run")
"""The positional arguments of every function; its settings are keywords."""


def initialize_hooks(config: RunConfig, run: Path) -> None:
    """Have hooks that are new in this run skip everything that has happened so far."""
    for name in config.hooks:
        if Progress.of(run, name) is None:
            Progress.now(run).save(run, name)


def evaluated_policies(graph: Graph) -> list[EvaluatedPolicy]:
    """The evaluated policies of a run, in the order of iterations."""
    found = []
    judging: dict[int | None, dict[str, str]] = {}
    for node in graph.nodes.values():
        if node.stage.name == "evaluation":
            judging.setdefault(node.iteration, {})[node.name] = ""
        elif node.stage.name == "checkpoint-evaluation":
            judging.setdefault(node.iteration, {})[node.name] = f"{node.path('output').name}/"
    for node in graph.nodes.values():
        if node.stage.name == "evaluation":
            sampler = graph.sampler(node.path("rollouts"))
            assert sampler is not None
            found.append(EvaluatedPolicy(node.iteration or 0, str(sampler.path("policy")), judging[node.iteration]))
    return found


def hook_mistakes(config: RunConfig) -> Iterator[UserError]:
    """The mistakes in the functions of a run's hooks that can be seen without calling them."""
    calls = {name: Call(hook.function, ARGUMENTS, tuple(hook.settings)) for name, hook in config.hooks.items()}
    with concurrent.futures.ThreadPoolExecutor(max(1, len(calls))) as pool:
        found = pool.map(mistake_in, calls.values())
        yield from (
            UserError(f"hooks.{name}: {mistake}") for name, mistake in zip(calls, found, strict=True) if mistake
        )


def check_hooks(config: RunConfig) -> None:
    """Raise UserError where a hook's function cannot be called."""
    for mistake in hook_mistakes(config):
        raise mistake
