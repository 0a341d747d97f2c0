"""Writes rollouts as Parquet, in the environment `annotation`: the driver's has no pyarrow."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from contracts.errors import UserError
from pipelines.config.run import RunConfig
from pipelines.environments.launch import launch_command, stage_environment
from pipelines.run.directory import RunDirectory


class RolloutsWriter:
    """Writes rollouts as Parquet in a process that is started once and reused: its imports take longer than writing the
    rows of an iteration."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._process: _Process | None = None

    def write(self, rollouts: Path, scores: Mapping[str, Path], target: Path) -> None:
        """Write the rows of an artifact of rollouts, each with the scores of its completions by scorer.

        Raises:
            UserError: the environment is missing, an artifact is damaged, or the disk is full.
        """
        if self._process is None:
            self._process = _Process(self._run.config)
        request = {
            "rollouts": str(rollouts),
            "scores": {name: str(path) for name, path in scores.items()},
            "target": str(target),
        }
        answer = self._process.ask(json.dumps(request).encode() + b"\n")
        if answer.endswith(b"\n"):
            mistake = json.loads(answer)
        else:  # the process has ended; the next call starts another one
            mistake = self._process.log_tail()
            self.close()
        if mistake is not None:
            raise UserError(f"{rollouts} could not be written as Parquet: {mistake}")

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.end()
            self._process = None


class _Process:
    """`python -m annotation.rollouts_parquet`, which ends with this process, even when this one is killed."""

    def __init__(self, config: RunConfig) -> None:
        argv = ["-P", "-m", "annotation.rollouts_parquet"]
        command, variables = launch_command(config.environments.annotation, "annotation", argv)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it is read when the process has ended
        self._process = subprocess.Popen(
            command,
            env=stage_environment(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def ask(self, request: bytes) -> bytes:
        """The answer to a request, a line; empty or without its newline where the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self._process.stdout.readline()

    def log_tail(self) -> str:
        """Wait for the end of the process, and return the last line of its stderr."""
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'its process wrote no message'} (exit code {code})"

    def end(self) -> None:
        """Kill the process. Files for which it has answered are complete."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()
