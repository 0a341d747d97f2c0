"""The batch scripts of a run's jobs: submitit's, as they are submitted, and as a dry run writes them.

A dry run leaves in <run directory>.dry-run/:
    resolved.yaml  the configuration with every default
    graph.json     the stages, what each asks for, and the sums
    sbatch/        the scripts of every stage that would run: NNN-STAGE.sbatch, and NNN-STAGE.finish.sbatch for the
                   small job after it
"""

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from submitit.slurm.slurm import SlurmExecutor

from contracts import yaml_text
from contracts.errors import UserError
from pipelines.config.executor import HEAVY, KINDS
from pipelines.config.run import RunConfig
from pipelines.execution.executors.local import job_folder
from pipelines.execution.executors.slurm.resources import (
    Resources,
    device_hours,
    finishing,
    resources_of,
    submitit_parameters,
)
from pipelines.execution.executors.slurm.scheduler import mark_of
from pipelines.execution.executors.slurm.task import start_again
from pipelines.graph import Graph, Node
from pipelines.text import say

DRY_RUN = ".dry-run"
FILES = frozenset({"resolved.yaml", "graph.json", "sbatch"})


class BatchExecutor(SlurmExecutor):
    """submitit's executor for Slurm, which can be made on a machine without Slurm as well, to see its scripts."""

    @classmethod
    def affinity(cls) -> int:
        """Where Slurm is missing, check_slurm says so."""
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -P -u -m pipelines.execution.executors.slurm.start {shlex.quote(str(self.folder))}"


def make_executor(folder: Path, parameters: Mapping[str, Any]) -> BatchExecutor:
    """An executor with these `submitit_parameters`, that describes its jobs in `folder`."""
    executor = BatchExecutor(folder)
    executor.update_parameters(**parameters)
    return executor


def script(executor: BatchExecutor, tasks: int) -> str:
    """The text that sbatch is given for a job, or for an array of several tasks."""
    if tasks > 1:
        executor.parameters["map_count"] = tasks
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def job_name(run: Path, stage: str, *, finishing: bool = False) -> str:
    """What a job is called in the queue."""
    return f"{run.name}/{stage}" + (" (finish)" if finishing else "")


@dataclass(frozen=True)
class Asked:
    """What a stage's jobs ask for."""

    work: Resources
    finish: Resources | None
    """The small job after an array, and in a detached run after every heavy stage."""

    @property
    def parts(self) -> list[Resources]:
        """Each kind of job."""
        return [self.work, *([self.finish] if self.finish else [])]

    @property
    def jobs(self) -> int:
        """How many jobs these are, every task of an array being one."""
        return sum(part.tasks for part in self.parts) if self.work.executor == "slurm" else 0

    def hours(self, *, gpu: bool) -> float:
        """GPU-hours, or the CPU-hours of the jobs that have no GPUs."""
        return sum(device_hours(part) for part in self.parts if bool(part.gpus) == gpu)


def asked(node: Node, graph: Graph, config: RunConfig, *, detached: bool) -> Asked:
    """What the jobs of a stage would ask for."""
    work = resources_of(node, config.executor, graph)
    ends = work.is_array or (detached and work.executor == "slurm" and work.kind in HEAVY)
    return Asked(work, finishing(config.executor) if ends else None)


def write_dry_run(
    console: Console, graph: Graph, config: RunConfig, runs: Mapping[str, str], *, detached: bool
) -> None:
    """Write what would be submitted, and print what it asks for.

    Args:
        runs: the stages that would run, and why.
        detached: whether all jobs would be submitted at once.

    Raises:
        UserError: something else is in the place of the directory.
    """
    folder = _fresh(graph.directory)
    wanted = {node.name: asked(node, graph, config, detached=detached) for node in graph.nodes.values()}
    for number, node in enumerate(graph.nodes.values(), start=1):
        if node.name in runs and wanted[node.name].work.executor == "slurm":
            _write_scripts(folder / "sbatch", number, node, graph, config, wanted, set(runs) if detached else set())
    (folder / "resolved.yaml").write_text(yaml_text.dump(config.model_dump(mode="json")), encoding="utf-8")
    stages = [_as_data(node, wanted[node.name], runs.get(node.name)) for node in graph.nodes.values()]
    sums = {key: sum(stage[key] for stage in stages if stage["name"] in runs) for key in ("jobs", *HOURS)}
    content = {"run": str(graph.directory), "detached": detached, "stages": stages, "total": sums}
    (folder / "graph.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _print(console, [stage for stage in stages if stage["name"] in runs])
    say(console, f"written: {folder}/sbatch, resolved.yaml, graph.json")


HOURS = ("gpu_hours", "cpu_hours")


def _fresh(run: Path) -> Path:
    """An empty directory beside a run's, in the place of that of an earlier dry run."""
    folder = run.with_name(run.name + DRY_RUN)
    if (
        folder.is_symlink()
        or (folder.exists() and not folder.is_dir())
        or (folder.is_dir() and not {path.name for path in folder.iterdir()} <= FILES)
    ):
        raise UserError(f"{folder} is not what a dry run has left, but it would write there. Move it away.")
    if folder.exists():
        shutil.rmtree(folder)
    try:
        (folder / "sbatch").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}. Set directory=PATH.") from error
    return folder


def _write_scripts(
    folder: Path,
    number: int,
    node: Node,
    graph: Graph,
    config: RunConfig,
    wanted: Mapping[str, Asked],
    waited_for: set[str],
) -> None:
    """Write a stage's scripts.

    Args:
        waited_for: the stages that are submitted at once with it; none with a driver.
    """
    run, name = graph.directory, f"{number:03d}-{node.name.replace('/', '-')}"
    before = [need for need in node.needs if need in waited_for and wanted[need].work.executor == "slurm"]
    success = [f"afterok:{':'.join(f'<job of {need}>' for need in before)}"] if before else []
    mine = wanted[node.name]
    again = start_again(config.executor.retries, config.executor.backoff_seconds) if waited_for else []
    for part, suffix, dependency in (
        (mine.work, "", success),
        (mine.finish, ".finish", [f"afterany:<work of {node.name}>", *success]),
    ):
        if part is None:
            continue
        parameters = submitit_parameters(
            part,
            name=job_name(run, node.name, finishing=part is mine.finish),
            comment=mark_of(run),
            grace_seconds=config.executor.grace_seconds,
            dependency=",".join(dependency) or None,
            kill_on_invalid_dependency=bool(dependency),
            teardown=again if part is (mine.finish or mine.work) else (),
        )
        executor = make_executor(job_folder(run) / "slurm" / f"{name}{suffix}", parameters)
        (folder / f"{name}{suffix}.sbatch").write_text(script(executor, part.tasks), encoding="utf-8")


def _as_data(node: Node, wanted: Asked, reason: str | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": node.name,
        "needs": list(node.needs),
        "kind": wanted.work.kind,
        "executor": wanted.work.executor,
        "verdict": "reuse" if reason is None else "run",
        "reason": reason,
        "jobs": wanted.jobs,
        "resources": asdict(wanted.work) if wanted.work.executor == "slurm" else None,
        "finish": asdict(wanted.finish) if wanted.finish else None,
    }
    return data | {key: round(wanted.hours(gpu=key == "gpu_hours"), 3) for key in HOURS}


def _print(console: Console, stages: list[dict[str, Any]]) -> None:
    """A line for every kind of stage, and the sums."""
    table = Table(title="Asked of Slurm, by the time limits, if nothing runs twice", title_justify="left")
    for title in ("kind", "stages", "jobs", "GPU-hours", "CPU-hours without GPUs"):
        table.add_column(title, justify="left" if title == "kind" else "right")
    for kind in (*KINDS, "total"):
        of_kind = [stage for stage in stages if stage["executor"] == "slurm" and kind in (stage["kind"], "total")]
        if of_kind:
            sums = [f"{sum(stage[key] for stage in of_kind):,.1f}" for key in HOURS]
            table.add_row(kind, str(len(of_kind)), str(sum(stage["jobs"] for stage in of_kind)), *sums)
    console.print(table)
