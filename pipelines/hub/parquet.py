"""Rollouts as Parquet, written in the environment of the annotation stages: the driver's has no pyarrow."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from contracts.errors import UserError
from pipelines.config.run import RunConfig
from pipelines.environments.launch import launch_command, stage_environment


def write_rollouts(config: RunConfig, rollouts: Path, scores: Mapping[str, Path], target: Path) -> None:
    """Write the rows of an artifact of rollouts, each with its answers' scores by scorer.

    Raises:
        UserError: the environment is not there, or the disk is full.
    """
    argv = ["-P", "-m", "annotation.rollouts_parquet", str(rollouts), str(target)]
    argv += [f"{name}={path}" for name, path in scores.items()]
    command, variables = launch_command(config.environments.annotation, "annotation", argv)
    result = subprocess.run(
        command, env=stage_environment(variables), stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if result.returncode != 0:
        last = (result.stderr.decode(errors="replace").strip() or "no output").splitlines()[-1]
        raise UserError(f"{rollouts} could not be written as Parquet (exit code {result.returncode}): {last}")
