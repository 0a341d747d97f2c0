"""Checks that the entries of executor.stages and placement.stages match stages, and chooses between CPU and GPU
environments."""

import os
from collections.abc import Iterable

from contracts.errors import UserError, did_you_mean
from pipelines.config.executor import KINDS_WITH_KEY, ExecutorSection
from pipelines.config.run import RunConfig
from pipelines.config.selecting import KINDS, matches
from pipelines.environments.locked import VARIANT
from pipelines.graph import Graph


def check_entries(graph: Graph, config: RunConfig) -> None:
    """Raise UserError if an entry of executor.stages or placement.stages matches no stage of the run, or none that its
    keys apply to."""
    _require_stages(graph, config.executor.stages, "executor.stages")
    _require_stages(graph, config.placement.stages, "placement.stages")
    for pattern, entry in config.executor.stages.items():
        if pattern in KINDS:
            continue
        named = [node for node in graph.nodes.values() if matches(node, pattern)]
        for key, kinds in KINDS_WITH_KEY.items():
            if getattr(entry, key) is not None and not any(node.workload in kinds for node in named):
                raise UserError(
                    f"executor.stages[{pattern!r}].{key} is {getattr(entry, key)}, but only {' and '.join(kinds)} "
                    f"stages can have `{key}`, and {named[0].name} is not one of them. Take it out."
                )

    for pattern, place in config.placement.stages.items():
        named = [node for node in graph.nodes.values() if matches(node, pattern)]
        for key in place.layout.model_fields_set:
            if named and not any(key in node.stage.layout_keys for node in named):
                known = ", ".join(named[0].stage.layout_keys) or "none"
                raise UserError(
                    f"placement.stages[{pattern!r}].layout.{key} is {getattr(place.layout, key)}, but {named[0].name} "
                    f"has no such key; it has {known}. Take it out."
                )


def _require_stages(graph: Graph, keys: Iterable[str], section: str) -> None:
    """Raise UserError if a key of a section matches no stage of the run; names of kinds are always valid."""
    for key in keys:
        if key in KINDS or any(matches(node, key) for node in graph.nodes.values()):
            continue
        roles = dict.fromkeys(node.role for node in graph.nodes.values())
        hint = did_you_mean(key, [*KINDS, *dict.fromkeys([*roles, *graph.nodes])], 3)
        raise UserError(
            f"{section} has an entry for {key!r}, but the run has no such stage.{hint} A key is {', '.join(KINDS)}, "
            "the role or the name of a stage, or a pattern with *; `--dry-run` lists the stages."
        )


def choose_variant(executor: ExecutorSection) -> None:
    """Choose the cpu or gpu environments by the resources requested from Slurm, not by this machine's GPUs.

    Sets RATCHET_VARIANT, which jobs inherit, unless the user has set it, and only if stages use Slurm: gpu if any
    requests GPUs, cpu if none does and all heavy ones run there.
    """
    if not executor.uses_scheduler or os.environ.get(VARIANT, "auto") not in ("", "auto"):
        return
    if executor.requests_gpus:
        os.environ[VARIANT] = "gpu"
    elif executor.is_remote:
        os.environ[VARIANT] = "cpu"
