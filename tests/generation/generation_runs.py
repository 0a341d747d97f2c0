"""Runs the generation stage by its real command line, and publishes prompts for it."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.forks import ForkedProcess, fork
from contracts.ledger import Ledger
from contracts.prompts import prompt_id
from contracts.publication import Publication
from contracts.records import PROMPTS, ROLLOUTS, Message, Prompt, Rollout
from contracts.versions import source_version
from pipelines.execution.warm import WarmProcesses

WARM = WarmProcesses(Path(tempfile.mkdtemp(prefix="generation-tests-")))
"""The processes that this test process forks stages from."""


def publish_prompts(path: Path, texts: Sequence[str], *, system: str | None = None, stage: str = "prompts") -> Path:
    """Publish one-turn prompts, optionally with a system message."""
    rows = []
    for text in texts:
        messages = (*([Message("system", system)] if system else []), Message("user", text))
        rows.append(Prompt(prompt_id(messages), messages, answer="w1", tags=("test",)))
    publication = Publication(path, PROMPTS, stage, "0" * 64)
    publication.begin()
    publication.write_rows("shard-00000.jsonl", rows, Ledger("prompts", len(rows), len(rows)))
    publication.publish(
        key_parts={}, inputs={}, input_paths={}, unit="prompts", weights=None, versions={}, seconds={}, facts={}
    )
    return path


def command(output: Path, config: dict[str, Any]) -> list[str]:
    """The command `python -m generation` with these keys."""
    overrides = [f"{name}={json.dumps(value, default=str)}" for name, value in {**config, "output": output}.items()]
    return [sys.executable, "-m", "generation", *overrides]


def start(output: Path, variables: dict[str, str] | None = None, /, **config: Any) -> "subprocess.Popen[str]":
    """Start `python -m generation`, optionally with additional environment variables."""
    return subprocess.Popen(
        command(output, config),
        env={**os.environ, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def generate(output: Path, **config: Any) -> Artifact:
    """Run the stage through its command line and open what it published.

    A stage with a single process is forked from a process that has imported vLLM, as the driver does, because importing
    takes longer than the tested work.
    """
    if config.get("servers") or config.get("replicas", 1) > 1:
        process = start(output, **config)
        output_text = "".join(process.communicate(timeout=300))
    else:
        with tempfile.TemporaryFile() as log:
            place = (os.environ, os.getcwd(), source_version("generation"), log)
            process = fork(imported(), command(output, config), *place, 200.0)
            assert process is not None, "no stage can be forked"
            wait_until_ended(process, 300)
            log.seek(0)
            output_text = log.read().decode(errors="replace")
    assert process.returncode == 0, output_text
    return Artifact.open(output, ROLLOUTS)


@functools.cache
def imported() -> Path:
    """The socket of a process that has imported the stage's modules; it ends with this process."""
    return WARM.address("generation", sys.executable, os.environ, os.getcwd(), ["vllm"])


def wait_until_ended(process: ForkedProcess, seconds: float) -> None:
    """Wait for the end of a forked stage."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.01)


def refuse(output: Path, **config: Any) -> str:
    """Run the stage with a mistake in its config. Checks that it fails with exactly one message, and returns stderr."""
    process = start(output, **config)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    left = [path.name for path in output.parent.iterdir() if path.name.lstrip(".").startswith(output.name)]
    assert left == []
    return err


def rows(artifact: Artifact) -> list[Rollout]:
    """All rollouts of an artifact."""
    return list(artifact.rows(Rollout))


def processed_config(engine: str, policy: Path, prompts: Path) -> dict[str, Any]:
    return {
        "engine": engine,
        "policy": policy,
        "prompts": prompts,
        "shard_size": 8,
        "max_num_seqs": 16,
        "k": 4,
        "temperatures": [1.0, 0.7],
        "top_k": 40,
        "top_p": 0.95,
        "max_new_tokens": 24,
        "iteration": 2,
    }


def raw_config(engine: str, policy: Path, prompts: Path) -> dict[str, Any]:
    return {
        "engine": engine,
        "policy": policy,
        "prompts": prompts,
        "shard_size": 3,
        "logprob_mode": "raw",
        "k": 2,
        "temperatures": [0.7, 0.0],
        "max_new_tokens": 48,
        "seed": 7,
    }


def processes_with_argument(path: Path) -> list[int]:
    """The ids of other processes that have `path` on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [number for number in found if number != os.getpid()]
