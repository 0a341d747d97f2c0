"""Generates the batch scripts of a run's jobs with submitit, for submission and for dry runs.

A dry run writes into <run directory>.dry-run/:
    resolved.yaml  the configuration with all defaults
    graph.json     the stages, their resource requests, and the sums
    sbatch/        the scripts of every stage that would run: NNN-STAGE.sbatch, and NNN-STAGE.finish.sbatch for the
                   small job after it
"""

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.slurm.slurm import SlurmExecutor

from contracts import yaml_text
from contracts.errors import UserError
from contracts.fingerprint import digest
from pipelines.config.executor import ExecutorSection
from pipelines.config.run import RunConfig
from pipelines.config.selecting import KINDS
from pipelines.environments.paths import home
from pipelines.execution.executors.slurm.resources import (
    Resources,
    device_hours,
    finalizing_resources,
    resources_of,
    submitit_parameters,
)
from pipelines.execution.executors.slurm.scheduler import comment_of
from pipelines.execution.executors.slurm.task import Duty, restart_lines
from pipelines.graph import Graph, Node
from pipelines.text import echo

if TYPE_CHECKING:
    from rich.console import Console

DRY_RUN = ".dry-run"
FILES = frozenset({"resolved.yaml", "graph.json", "sbatch"})


class BatchExecutor(SlurmExecutor):
    """submitit's executor for Slurm, which can also generate scripts without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Accept machines without Slurm; `check_slurm` reports them."""
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -P -u -m pipelines.execution.executors.slurm.start {shlex.quote(str(self.folder))}"


def make_executor(folder: Path, parameters: Mapping[str, Any]) -> BatchExecutor:
    """An executor with these `submitit_parameters`; `folder` holds its scripts and pickles."""
    executor = BatchExecutor(folder)
    executor.update_parameters(**parameters)
    return executor


def script(executor: BatchExecutor, tasks: int) -> str:
    """The batch script of a job, or of an array of several tasks."""
    if tasks > 1:
        executor.parameters["map_count"] = tasks
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


@dataclass(frozen=True)
class PlannedJob:
    """One of the jobs of an attempt at a stage."""

    resources: Resources
    duties: tuple[Duty, ...]

    @property
    def step(self) -> str:
        """The job's role in the attempt: work or finish."""
        return "work" if "work" in self.duties else "finish"

    def executor(
        self,
        folder: Path,
        run: Path,
        stage: str,
        settings: ExecutorSection,
        dependency: list[str],
        pause: float = 0.0,
        exclude: str = "",
    ) -> BatchExecutor:
        """submitit's executor for this job, with its scripts and pickles in `folder`.

        Args:
            exclude: the nodes outside the stage's pool.
        """
        again = restart_lines(settings.retries, settings.backoff_seconds) if "finalize" in self.duties else ()
        parameters = submitit_parameters(
            self.resources,
            name=f"{run.name}/{stage}" + (" (finish)" if self.step == "finish" else ""),
            comment=comment_of(run),
            grace_seconds=settings.grace_seconds,
            dependency=",".join(dependency) or None,
            begin=pause,
            teardown=again,
            exclude=exclude,
        )
        return make_executor(folder, parameters)


def planned_jobs(node: Node, settings: ExecutorSection, graph: Graph, *, detached: bool) -> list[PlannedJob]:
    """The jobs of an attempt at a stage, in order; the second one finishes the work of the first.

    Args:
        detached: whether the last job finalizes the stage; for a light stage its only job does.
    """
    work = resources_of(node, settings, graph)
    if work.executor != "slurm" or (detached and work.kind == "light"):
        return [PlannedJob(work, ("work", "finalize"))]
    later: tuple[Duty, ...] = (*(("publish",) if work.is_array else ()), *(("finalize",) if detached else ()))
    return [PlannedJob(work, ("work",)), *([PlannedJob(finalizing_resources(settings), later)] if later else [])]


def write_dry_run(
    console: "Console", graph: Graph, config: RunConfig, runs: Mapping[str, str], *, detached: bool
) -> None:
    """Write the scripts that would be submitted, and print their resource requests.

    Args:
        runs: the stages that would run, with the reasons.
        detached: whether all jobs would be submitted at once.

    Raises:
        UserError: the directory exists with other content.
    """
    folder = _fresh(graph.directory)
    wanted = {node.name: planned_jobs(node, config.executor, graph, detached=detached) for node in graph.nodes.values()}
    for number, node in enumerate(graph.nodes.values(), start=1):
        if node.name in runs and wanted[node.name][0].resources.executor == "slurm":
            name = f"{number:03d}-{node.name.replace('/', '-')}"
            before = [need for need in node.needs if detached and need in runs]
            _write_scripts(folder / "sbatch" / name, node, graph.directory, config, wanted[node.name], before)
    (folder / "resolved.yaml").write_text(yaml_text.dump(config.model_dump(mode="json")), encoding="utf-8")
    stages = [_as_data(node, wanted[node.name], runs.get(node.name)) for node in graph.nodes.values()]
    sums = {key: sum(stage[key] for stage in stages if stage["name"] in runs) for key in ("jobs", *HOURS)}
    content = {"run": str(graph.directory), "detached": detached, "stages": stages, "total": sums}
    (folder / "graph.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _print(console, [stage for stage in stages if stage["name"] in runs])
    echo(console, f"written: {folder}/sbatch, resolved.yaml, graph.json")


HOURS = ("gpu_hours", "cpu_hours")


def _fresh(run: Path) -> Path:
    """Create an empty directory for a dry run, replacing that of an earlier one."""
    folder = run.with_name(run.name + DRY_RUN)
    if (
        folder.is_symlink()
        or (folder.exists() and not folder.is_dir())
        or (folder.is_dir() and not {path.name for path in folder.iterdir()} <= FILES)
    ):
        raise UserError(f"{folder} was not created by a dry run, which writes there. Move it away.")
    if folder.exists():
        shutil.rmtree(folder)
    try:
        (folder / "sbatch").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error.strerror}. Set directory=PATH.") from error
    return folder


def _write_scripts(
    path: Path, node: Node, run: Path, config: RunConfig, jobs: list[PlannedJob], before: list[str]
) -> None:
    """Write the scripts of a stage's jobs; `before` names the stages that they depend on."""
    success = [f"afterok:{':'.join(f'<job of {need}>' for need in before)}"] if before else []
    for job in jobs:
        suffix = "" if job is jobs[0] else ".finish"
        dependency = success if job is jobs[0] else [f"afterany:<work of {node.name}>", *success]
        folder = slurm_folder(run) / f"{path.name}{suffix}"
        outside = f"<nodes outside of {job.resources.pool_nodes}>" if job.resources.pool_nodes else ""
        executor = job.executor(folder, run, node.name, config.executor, dependency, exclude=outside)
        path.with_name(f"{path.name}{suffix}.sbatch").write_text(script(executor, job.resources.tasks), "utf-8")


def _as_data(node: Node, jobs: list[PlannedJob], reason: str | None) -> dict[str, Any]:
    asked = [job.resources for job in jobs]
    on_slurm = asked[0].executor == "slurm"
    return {
        "name": node.name,
        "needs": list(node.needs),
        "kind": asked[0].kind,
        "executor": asked[0].executor,
        "verdict": "reuse" if reason is None else "run",
        "reason": reason,
        "jobs": sum(part.tasks for part in asked) if on_slurm else 0,
        "resources": asdict(asked[0]) if on_slurm else None,
        "finish": asdict(asked[1]) if asked[1:] else None,
        "gpu_hours": round(sum(device_hours(part) for part in asked if part.gpus), 3),
        "cpu_hours": round(sum(device_hours(part) for part in asked if not part.gpus), 3),
    }


def _print(console: "Console", stages: list[dict[str, Any]]) -> None:
    """Print a line for every kind of stage, and the sums."""
    from rich.table import Table  # not imported by jobs, which import this module

    table = Table(title="Asked of Slurm, by the time limits, if nothing runs twice", title_justify="left")
    for title in ("kind", "stages", "jobs", "GPU-hours", "CPU-hours without GPUs"):
        table.add_column(title, justify="left" if title == "kind" else "right")
    for kind in (*KINDS, "total"):
        of_kind = [stage for stage in stages if stage["executor"] == "slurm" and kind in (stage["kind"], "total")]
        if of_kind:
            sums = [f"{sum(stage[key] for stage in of_kind):,.1f}" for key in HOURS]
            table.add_row(kind, str(len(of_kind)), str(sum(stage["jobs"] for stage in of_kind)), *sums)
    console.print(table)


def slurm_folder(run: Path) -> Path:
    """The directory of submitit's scripts and pickles for a run; all nodes must see it.

    It is outside of the run directory, which people copy and share, because reading a pickle can run code.
    """
    return home() / "jobs" / digest(str(run.resolve()))[:16] / "slurm"
