"""Builds other pairs from an iteration's rollouts and scores than those that the run trained on.

    alternatives/iteration-001/top_k_bottom_k-1a2b3c4d/     named by strategy and the first digits of the stage key

No stage of the run reads them.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from annotation.pairing.config import PairsConfig, PairsSettings
from annotation.stages.pairs import CHOOSE_PAIRS
from contracts.artifacts import Artifact, is_published
from contracts.config import apply_overrides, validate
from contracts.errors import UserError, did_you_mean
from contracts.manifest import MANIFEST
from contracts.preflight import PreflightReport, PreflightRequest, StageRequest, refuse
from contracts.records import PAIRS
from contracts.stage import key_parts, stage_key
from pipelines.config.changes import merge
from pipelines.config.run import RunConfig
from pipelines.environments.launch import ask, launch_command, probe_versions, stage_environment
from pipelines.graph import Graph, Node, folder_of, name_of
from pipelines.run.decisions import ALTERNATIVES
from pipelines.run.directory import RunDirectory
from pipelines.text import format_ranges

ROLE = "pairs"
KEYS = (*PairsSettings.model_fields, "seed", "output")
"""Keys that `pipeline pairs` accepts."""


@dataclass(frozen=True)
class Alternative:
    """Pairs built from an iteration's rollouts with some settings changed."""

    node: Node
    """The run's own node that makes the iteration's pairs."""
    config: PairsConfig
    key: str
    changes: list[str]
    """Overrides with which a run would make these pairs, as keys of the run config; empty if there are none."""
    place: Path
    """Directory of the iteration's alternatives; those with an `output` of their own are elsewhere."""

    @property
    def iteration(self) -> int:
        """The iteration whose rollouts they are built from."""
        assert self.node.iteration is not None
        return self.node.iteration

    @property
    def path(self) -> Path:
        """The directory that they are published in."""
        return self.config.output

    @property
    def is_own(self) -> bool:
        """Whether they are the pairs that the run itself made."""
        return self.path == self.node.output

    @property
    def is_published(self) -> bool:
        """Whether they are published.

        Raises:
            UserError: the path is occupied by something else.
        """
        return is_published(self.path, self.key)


def select_alternative(run: RunDirectory, graph: Graph, iteration: int | None, overrides: list[str]) -> Alternative:
    """The pairs that `overrides` give for an iteration; by default for the last one that has rollouts and scores.

    Raises:
        UserError: the run or this iteration makes no pairs, its inputs are not published yet, or a key or value is
            wrong.
    """
    node = _node(run, graph, iteration)
    change = apply_overrides({}, overrides)
    for name in change:
        if name not in KEYS:
            hint = did_you_mean(name, KEYS)
            if name in RunConfig.model_fields:
                hint = " Give keys of `pairs` only, without the prefix."
            raise UserError(
                f"{name!r} cannot be set here: pairs are rebuilt from an iteration's own responses and scores."
                f"{hint} Known keys: {', '.join(KEYS)}."
            )
    output = change.pop("output", None)
    fields = merge(node.config.model_dump(exclude_unset=True), change)
    config = validate(PairsConfig, fields, "pipeline pairs")
    versions = probe_versions(run.config.environments.of(node.environment), node.environment)
    key = stage_key(key_parts(config, versions))
    place = run.path / ALTERNATIVES / folder_of(node.iteration or 0)
    own = Artifact.open(node.output).manifest.key if (node.output / MANIFEST).is_file() else None
    if output is not None:
        path = Path(str(output)).absolute()
    elif own == key or (own and not change):
        path, key = node.output, own
    else:
        name = config.strategy.rpartition(":")[2]  # the name of a user's function, without its file
        path = place / f"{re.sub('[^A-Za-z0-9_]+', '_', name)}-{key[:8]}"
    given = [text for text in overrides if not text.startswith("output=")]
    changes = [] if "seed" in change else [f"{ROLE}.{text}" for text in given]  # a run derives its seeds itself
    return Alternative(node, config.model_copy(update={"output": path}), key, changes, place)


def build(alternative: Alternative, run: RunDirectory, stdout: IO[str] | None) -> int:
    """Run the stage in the foreground. Returns its exit code.

    Args:
        stdout: where it prints; by default this process's standard output.

    Raises:
        UserError: the user's strategy cannot be called with its settings.
    """
    node, config = alternative.node, alternative.config
    if config.is_own:
        _require_callable(alternative, run)
    fields = config.model_dump(mode="json", exclude_unset=True) | {"output": str(config.output)}
    argv = [*node.argv, *(f"{name}={msgspec.json.encode(value).decode()}" for name, value in fields.items())]
    command, variables = launch_command(run.config.environments.of(node.environment), node.environment, argv)
    variables.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    code = subprocess.run(command, env=stage_environment(variables), stdout=stdout, check=False).returncode
    return code if code >= 0 else 1


def _require_callable(alternative: Alternative, run: RunDirectory) -> None:
    """Run the preflight check of the user's strategy in the stage's environment, as `pipeline run` does."""
    node, fields = alternative.node, alternative.config.model_dump(mode="json", exclude_unset=True)
    fields["output"] = "preflight"
    request = PreflightRequest((StageRequest(node.name, node.package, node.stage.command, fields, ()),))
    environment = run.config.environments.of(node.environment)
    encoded = msgspec.json.encode(request)
    answer = ask(environment, node.environment, ["-m", "contracts.preflight"], "run preflight", request=encoded)
    refuse(msgspec.json.decode(answer, type=PreflightReport).findings)


def _node(run: RunDirectory, graph: Graph, iteration: int | None) -> Node:
    """The node that makes an iteration's pairs. Raises UserError if there is none or its inputs are missing."""
    last = max((node.iteration or 0 for node in graph.nodes.values()), default=0)
    made = {node.iteration or 0: node for node in graph.nodes.values() if _is_pairs(node)}
    if not made:
        raise UserError(
            f"{run.path} makes no pairs: training.algorithm={run.config.training.algorithm} trains on the samples "
            "themselves. Only the pairs of algorithms that read pairs can be rebuilt."
        )
    if iteration is None:
        ready = [number for number, node in made.items() if not _missing(node)]
        iteration = max(ready, default=min(made))
    if iteration not in made:
        available = f"it has iterations 1 to {last}" if last > 1 else "it has iteration 1"
        if 1 <= iteration <= last:
            available = f"that iteration trains on samples; those with pairs: {format_ranges(made)}"
        raise UserError(f"--iteration is {iteration}, but {run.path} has no pairs of it: {available}.")
    node = made[iteration]
    if missing := _missing(node):
        raise UserError(
            f"{name_of(iteration, ROLE)} cannot be made yet: {' and '.join(map(str, missing))} not published. Continue "
            "the run first."
        )
    return node


def _is_pairs(node: Node) -> bool:
    return node.stage is CHOOSE_PAIRS and node.iteration is not None and node.role == ROLE


def _missing(node: Node) -> list[Path]:
    """The inputs that are not published."""
    return [path for path in node.inputs if not (path / MANIFEST).is_file()]


def pairs_to_compare(alternative: Alternative) -> dict[str, Artifact]:
    """The run's own pairs if published, and `alternative`; for the run's own, all alternatives of its iteration."""
    own, folder = alternative.node.output, alternative.place
    others = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")) if alternative.is_own else [alternative.path]
    found = {"the run's": Artifact.open(own, PAIRS)} if (own / MANIFEST).is_file() else {}
    return found | {path.name: Artifact.open(path, PAIRS) for path in others}
