"""Checks for mistakes in the use of Slurm before anything is submitted."""

import shutil
import subprocess

from contracts.errors import UserError
from pipelines.config.executor import ExecutorSection, minutes_of
from pipelines.execution.executors.slurm.resources import Resources, finalizing_resources, resources_of
from pipelines.execution.executors.slurm.scheduler import nodes_outside
from pipelines.graph import Graph

PROGRAMS = ("sbatch", "squeue", "sacct", "sinfo", "scancel", "scontrol", "srun")
LOCAL = "or set executor=local to run on this machine"
ANSWER_SECONDS = 120
"""Maximum time that a Slurm command may take to answer."""


def check_slurm(executor: ExecutorSection, graph: Graph) -> None:
    """Check that this machine belongs to a Slurm cluster that can satisfy the stages' requests.

    Raises:
        UserError: the first mistake found.
    """
    asked = {node.name: resources_of(node, executor) for node in graph.nodes.values()}
    asked = {name: resources for name, resources in asked.items() if resources.executor == "slurm"}
    if not asked:
        return
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"executor is slurm, but {', '.join(missing)} is not on PATH. Start from a node of the cluster, load its "
            f"module, {LOCAL}."
        )
    _ask("sacct", "--noheader", "--starttime=now-1minute", fix="Ratchet needs Slurm's accounting (slurmdbd): ask "
         f"those who run the cluster, {LOCAL}.")  # fmt: skip
    for nodes in dict.fromkeys(resources.pool_nodes for resources in asked.values() if resources.pool_nodes):
        nodes_outside(nodes)
    partitions = _partitions()
    for name, resources in {**asked, "the finishing jobs": finalizing_resources(executor)}.items():
        _check_partition(name, resources, partitions)


def _check_partition(stage: str, resources: Resources, partitions: dict[str, int | None]) -> None:
    """Raise UserError if a stage's partition does not exist, or its time limit is below the stage's request."""
    names = resources.partition.split(",") if resources.partition else [""]
    for name in names:
        if name not in partitions:
            known = ", ".join(filter(None, partitions))
            found = f"the partition {name!r} does not exist" if name else "the cluster has no default partition"
            raise UserError(f"{stage}: {found}. Set executor.resources.partition to one of {known}.")
    limits = [partitions[name] for name in names]
    longest = max((limit for limit in limits if limit is not None), default=0)
    # A quality of service may exceed the limit of the partition.
    if None not in limits and resources.minutes > longest and resources.qos is None:
        shown = f"the partition {resources.partition}" if resources.partition else "the default partition"
        raise UserError(
            f"{stage}: asks for {resources.minutes} minutes, but {shown} allows {longest} at most. Set `time` to less, "
            f"for example executor.stages.{resources.kind}.time={clock(longest)}: a stage that reaches its limit goes "
            "on in another job. Or name another partition."
        )


def _partitions() -> dict[str, int | None]:
    """Time limit of each partition in minutes, None if unlimited; the default partition also under the key \"\"."""
    found: dict[str, int | None] = {}
    fix = f"Ask those who run the cluster, {LOCAL}."
    for line in _ask("sinfo", "--all", "--noheader", "--format=%P|%l", fix=fix).splitlines():
        name, _, limit = line.partition("|")
        found[name.rstrip("*")] = minutes_of(limit)
        if name.endswith("*"):
            found[""] = minutes_of(limit)
    return found


def _ask(*command: str, fix: str) -> str:
    """Standard output of a Slurm command; raises UserError with its message and `fix` if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"`{' '.join(command)}` did not answer within {ANSWER_SECONDS} s. {fix}") from error
    if result.returncode != 0:
        message = "; ".join((result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-3:])
        raise UserError(f"`{' '.join(command)}` failed with exit code {result.returncode}: {message}. {fix}")
    return result.stdout


def clock(minutes: int) -> str:
    """A time limit as Slurm and YAML read it."""
    days, rest = divmod(minutes, 24 * 60)
    return (f"{days}-" if days else "") + f"{rest // 60:02d}:{rest % 60:02d}:00"
