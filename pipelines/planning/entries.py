"""What the entries of executor.stages are for, and what follows from where stages run."""

import fnmatch
import os

from contracts.errors import UserError, did_you_mean
from pipelines.config.executor import KINDS, ONLY_IN, ExecutorSection
from pipelines.environments.locked import VARIANT
from pipelines.graph import Graph


def check_patterns(graph: Graph, executor: ExecutorSection) -> None:
    """Raise UserError where an entry of executor.stages is for no stage of the run, or for none that has its keys."""
    for pattern, entry in executor.stages.items():
        if pattern in KINDS:
            continue
        named = [node for node in graph.nodes.values() if fnmatch.fnmatchcase(node.name, pattern)]
        if not named:
            hint = did_you_mean(pattern, [*KINDS, *graph.nodes], 3)
            raise UserError(
                f"executor.stages has an entry for {pattern!r}, but the run has no such stage.{hint} A key is "
                f"{', '.join(KINDS)}, the name of a stage, or a pattern with *; `--dry-run` lists the stages."
            )
        for key, kinds in ONLY_IN.items():
            if getattr(entry, key) is not None and not any(node.workload in kinds for node in named):
                raise UserError(
                    f"executor.stages[{pattern!r}].{key} is {getattr(entry, key)}, but only {' and '.join(kinds)} "
                    f"stages can have `{key}`, and {named[0].name} is none. Take it out."
                )


def choose_variant(executor: ExecutorSection) -> None:
    """Decide between the cpu and the gpu environments by what is asked of Slurm, not by the GPUs of this machine.

    Sets RATCHET_VARIANT, which the jobs inherit, where the user has not, and as far as all heavy stages run on Slurm.
    """
    if not executor.uses_scheduler or os.environ.get(VARIANT, "auto") not in ("", "auto"):
        return
    if executor.asks_gpus:
        os.environ[VARIANT] = "gpu"
    elif executor.is_remote:
        os.environ[VARIANT] = "cpu"
