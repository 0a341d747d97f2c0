"""Runs the generation stage by its real command line, and publishes prompts for it."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warm_stages import WarmStage, start_stage

from contracts.artifacts import Artifact
from contracts.ledger import Ledger
from contracts.prompts import prompt_id
from contracts.publication import Publication
from contracts.records import PROMPTS, ROLLOUTS, Message, Prompt, Rollout

LIBRARIES = ("vllm",)
"""What the process imports that stages are forked from."""


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


def overrides(output: Path, config: dict[str, Any]) -> list[str]:
    """The stage's arguments for these keys."""
    return [f"{name}={json.dumps(value, default=str)}" for name, value in {**config, "output": output}.items()]


def start(output: Path, variables: dict[str, str] | None = None, /, **config: Any) -> WarmStage:
    """Start `python -m generation`, optionally with additional environment variables.

    It is a fork of a process that has imported vLLM, and so are its replicas.
    """
    return start_stage("generation", *overrides(output, config), environment=variables, libraries=LIBRARIES)


def generate(output: Path, **config: Any) -> Artifact:
    """Run the stage through its command line and open what it published."""
    process = start(output, **config)
    told = "".join(process.communicate())
    assert process.returncode == 0, told
    return Artifact.open(output, ROLLOUTS)


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


def require_trace(folder: Path) -> None:
    """Require a profiler's trace of the shard 1, and none of others."""
    (trace,) = [path for path in folder.iterdir() if path.name.endswith(".json.gz")]
    assert trace.name.startswith("shard-00001")
    names = {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("attention" in name for name in names)


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
