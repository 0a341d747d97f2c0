"""The smallest possible run with every kind of stage and several steps in each training."""

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from forked import run_forked
from pretend import write_interpreter

COMMAND = [sys.executable, "-m", "pipelines"]
SECRET = "hf_" + "QqSecretQq" * 4
SAVING = {"checkpoint_seconds": 0}
"""Saves the training state after every optimizer step."""
SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "seed": 0,
    "world": {"demonstrations": 64, "train": 24, "preference": 24, "heldout": 10},
    "policy": "world:model",
    "sft": {"demonstrations": "world:demonstrations.jsonl", "global_batch": 8, "learning_rate": 1e-3, **SAVING},
    "prompts": {
        "train": {"source": "world:train.jsonl"},
        "heldout": {"source": "world:heldout.jsonl"},
        "per_iteration": 12,
    },
    "reward_model": {
        "prompts": {"source": "world:preference.jsonl"},
        "label": "gold",
        "training": {"global_batch": 4, "learning_rate": 5e-4, **SAVING},
    },
    "scorers": {
        "reward": {"kind": "reward_model"},
        "well_formed": {"kind": "rule", "function": "embedded.reviews:well_formed"},
    },
    "generation": {"k": 4, "max_new_tokens": 12, "shard_size": 5, "engine": "transformers"},
    "training": {"global_batch": 2, "learning_rate": 1e-4, **SAVING},
}


RULES = '''
"""A custom scorer that can distinguish the answers of a barely trained model."""


def variety(*, messages, response, finish_reason, answer):
    return len(set(response.split())) + len(response) / 100
'''


def write_smallest(folder: Path) -> Path:
    """Write the smallest run's config file with its scorer next to it, and return its path."""
    (folder / "rules.py").write_text(RULES)
    path = folder / "smallest.yaml"
    config = {**SMALLEST, "directory": str(folder / "runs")}
    config["scorers"] = {**SMALLEST["scorers"], "gold": {"kind": "rule", "function": f"{folder / 'rules.py'}:variety"}}
    path.write_text(yaml.safe_dump(config))
    return path


def pipeline(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return run_forked("pipelines", *arguments, **options)  # type: ignore[arg-type]


@dataclass
class FinishedRun:
    """An uninterrupted run of two iterations, with secrets in its environment."""

    config: Path
    output: str
    """The output of the command."""
    command_lines: set[str] = field(default_factory=set)
    """All command lines seen on this machine during the run."""

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.config.parent / "runs" / "smallest"


def finish_smallest(config: Path) -> FinishedRun:
    """Run the smallest run to its end."""
    run = FinishedRun(config, "")
    done = threading.Event()
    watcher = threading.Thread(target=watch_process_list, args=(run.command_lines, done))
    watcher.start()
    try:
        environment = {**os.environ, "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
        command = [*COMMAND, "run", str(config), "--iters", "2"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    finally:
        done.set()
        watcher.join()
    assert result.returncode == 0, result.stderr
    run.output = result.stdout
    return run


def watch_process_list(command_lines: set[str], done: threading.Event) -> None:
    """Collect the command lines of all new processes on this machine; each is read several times, since it may exec."""
    looks: dict[str, int] = {}
    while not done.wait(0.05):
        there = [name for name in os.listdir("/proc") if name.isdigit()]
        looks = {name: looks.get(name, 0) + 1 for name in there}
        for name in there:
            if looks[name] <= 20:
                with contextlib.suppress(OSError):
                    command_lines.add(Path("/proc", name, "cmdline").read_text(errors="replace"))


PRETENDED: dict[str, Any] = {
    "name": "pretended",
    "world": SMALLEST["world"],
    "policy": "world:model",
    "prompts": SMALLEST["prompts"],
    "scorers": {"reward": {"kind": "rule", "function": "embedded.reviews:well_formed"}},
    "generation": {"k": 2, "max_new_tokens": 4, "engine": "transformers"},
}
"""A run with few stages, for the fake interpreter (pretend.py)."""


def write_pretended(folder: Path, *, executor: dict[str, Any] | None = None, **acts: list[str]) -> Path:
    """Write the config file of a run with fake stages, which misbehave as `acts` specifies (pretend.py)."""
    python = str(write_interpreter(folder / "interpreter", **acts))
    environments = {name: {"python": python} for name in ("generation", "annotation", "training")}
    path = folder / "pretended.yaml"
    config = {**PRETENDED, "directory": str(folder / "runs"), "environments": environments}
    config["executor"] = {"backoff_seconds": 0.1, **(executor or {})}
    path.write_text(yaml.safe_dump(config))
    return path
