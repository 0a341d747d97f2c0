"""Prepares attempts at a stage, and decides about retries."""

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import msgspec

from contracts import yaml_text
from contracts.attempt import FailureKind
from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.stage import require_space
from contracts.versions import source_version
from pipelines.config.executor import retry_pause
from pipelines.config.run import RunConfig
from pipelines.environments.launch import launch_command
from pipelines.execution.supervisor import DECISION, REQUEST, AttemptRequest, process_identity
from pipelines.graph import Graph, Node
from pipelines.machine import core_numbers, device_names, gpu_count
from pipelines.planning.estimates import disk_bytes
from pipelines.run.decisions import Decision


class StageFailedError(Exception):
    """A stage ended without publishing."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Retries:
    """Decides whether and when a stage is retried."""

    def __init__(self, limit: int, backoff: float) -> None:
        self.limit = limit
        self.backoff = backoff
        self._transient: Counter[str] = Counter()
        self._preemptions: Counter[str] = Counter()
        self._until: dict[str, float] = {}
        self._chance = random.Random()

    def waits(self, stage: str) -> bool:
        """Whether a stage still pauses before its next attempt."""
        return time.monotonic() < self._until.get(stage, 0.0)

    def pause_after(self, stage: str, kind: FailureKind) -> float | None:
        """Count a failed attempt. Returns the seconds until the next one, or None if there is none."""
        if kind == "stopped":
            counted = self._preemptions
        elif kind == "transient" and self._transient[stage] < self.limit:
            counted = self._transient
        else:
            return None
        counted[stage] += 1
        pause = retry_pause(counted[stage], self.backoff, self._chance)
        self._until[stage] = time.monotonic() + pause
        return round(pause, 1)


STAGE_CONFIG = "stage.yaml"


def write_request(node: Node, attempt: Path, request: AttemptRequest) -> None:
    """Write a stage's config and a supervisor's request into the attempt's directory."""
    write_atomically(attempt / STAGE_CONFIG, yaml_text.dump(node.config.model_dump(mode="json")).encode())
    write_atomically(attempt / REQUEST, msgspec.json.encode(request))


def stage_request(
    node: Node, attempt: Path, run: Path, config: RunConfig, threads: int, *, here: bool
) -> AttemptRequest:
    """The supervisor's request for an attempt at a stage.

    Args:
        threads: cores for each of the stage's processes.
        here: whether it runs on this machine and ends with this process.
    """
    path = attempt / STAGE_CONFIG
    environment = config.environments.of(node.environment)
    argv, variables = launch_command(environment, node.environment, [*node.argv, "--config", str(path)])
    variables.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))
    first_on_path, unset = "", []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not here:  # the node has its own PATH and devices
        unset = ["SUBMITIT_EXECUTOR", "SUBMITIT_FOLDER"]
        if "PATH" in variables and "PATH" not in environment.variables:
            first_on_path = variables.pop("PATH").partition(os.pathsep)[0]
    elif visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    cores: tuple[int, ...] = ()
    if here and node.placement is not None and node.placement.exclusive:
        variables |= {"CUDA_VISIBLE_DEVICES": device_names(node.placement.devices)} if gpu_count() else {}
        cores = () if gpu_count() else core_numbers(node.placement.devices)
    decision = decision_of(attempt)  # None in a detached run, where no stage follows another
    return AttemptRequest(
        argv=argv,
        environment=variables,
        unset=unset,
        directory=os.getcwd(),
        run=str(run) if here else "",
        driver=process_identity(os.getpid()) if here else None,
        grace_seconds=config.executor.grace_seconds,
        stall_seconds=config.executor.stall_seconds,
        first_on_path=first_on_path,
        source=source_version(node.package),
        cores=cores,
        follows=decision.follows if decision is not None else {},
    )


def require_disk_space(node: Node, graph: Graph, config: RunConfig) -> None:
    """Raise UserError if the disk has too little space for the estimated output of a stage."""
    run = graph.directory
    require_space(run, "directory")
    needed, free = disk_bytes(node, graph), shutil.disk_usage(run).free
    if config.executor.check_space and free < needed:
        raise UserError(
            f"stage {node.name} may need {needed >> 20} MiB on the disk of {run}, which has {free >> 20} MiB free. "
            "Free some space (`pipeline gc` deletes what is not needed), set directory=PATH on another disk, or "
            "executor.check_space=false to start anyway."
        )


def write_decision(attempt: Path, decision: Decision) -> None:
    """Write the decision into the attempt's directory."""
    write_atomically(attempt / DECISION, msgspec.json.encode(decision))


def decision_of(attempt: Path) -> Decision | None:
    """The decision for an attempt; None if there is none yet."""
    try:
        return msgspec.json.decode((attempt / DECISION).read_bytes(), type=Decision)
    except (OSError, ValueError):  # none yet, or damaged: the decision is repeated
        return None
