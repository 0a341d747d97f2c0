"""What a hook's process is told, how far it has read, and what can be found wrong with its function before."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.points import METRICS
from contracts.trial import Call, mistake_in
from pipelines.config.run import RunConfig
from pipelines.graph import Graph
from pipelines.run.events import FILE

GIVEN = ("happening", "run")
"""What every function is given, beside its settings."""


class EvaluatedPolicy(msgspec.Struct, frozen=True):
    """A policy of the run, and the stages that judge it."""

    iteration: int
    policy: str
    """Directory of its checkpoint; hf:ORG/NAME where it has not been downloaded."""
    stages: dict[str, str]
    """By stage, what its metrics' names begin with: nothing, or NAME/ of an evaluation of the user's own."""


class HookTask(msgspec.Struct, frozen=True):
    """One hook of one run."""

    hook: str
    function: str
    settings: dict[str, Any]
    kinds: list[str]
    """What it is to be told."""
    run: str
    grace_seconds: float
    evaluated: list[EvaluatedPolicy]


class Progress(msgspec.Struct):
    """How much of a run's files a hook has been told, in bytes."""

    events: int
    metrics: int

    @classmethod
    def of(cls, run: Path, hook: str) -> "Progress | None":
        """What is on the disk; None where there is nothing, or nothing that can be read."""
        try:
            return msgspec.json.decode(_file(run, hook).read_bytes(), type=cls)
        except (FileNotFoundError, ValueError):
            return None

    @classmethod
    def now(cls, run: Path) -> "Progress":
        """That of a hook which has been told all that there is."""
        return cls(_size(run / FILE), _size(run / METRICS))

    def save(self, run: Path, hook: str) -> None:
        """Keep it on the disk: after a kill, the next process goes on from here."""
        path = _file(run, hook)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, msgspec.json.encode(self), durable=False)


def _file(run: Path, hook: str) -> Path:
    return run / "hooks" / f"{hook}.json"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def begin_hooks(config: RunConfig, run: Path) -> None:
    """Have the hooks that this run did not have before begin with what happens from now on."""
    for name in config.hooks:
        if Progress.of(run, name) is None:
            Progress.now(run).save(run, name)


def evaluated_policies(graph: Graph) -> list[EvaluatedPolicy]:
    """The policies of a run that are evaluated, in the order of iterations."""
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
    """What is wrong with the functions of a run's hooks, as far as it can be seen without calling them."""
    calls = {name: Call(hook.function, GIVEN, tuple(hook.settings)) for name, hook in config.hooks.items()}
    with concurrent.futures.ThreadPoolExecutor(max(1, len(calls))) as pool:
        found = pool.map(mistake_in, calls.values())
        yield from (
            UserError(f"hooks.{name}: {mistake}") for name, mistake in zip(calls, found, strict=True) if mistake
        )


def check_hooks(config: RunConfig) -> None:
    """Raise UserError where a hook's function cannot be called."""
    for mistake in hook_mistakes(config):
        raise mistake
