"""What a hook's process is told, and how far it has read. Its process imports no more than it needs."""

import os
from pathlib import Path
from typing import Any

import msgspec

from contracts.files import write_atomically
from contracts.points import METRICS
from pipelines.run.events import FILE


class EvaluatedPolicy(msgspec.Struct, frozen=True):
    """A policy of the run, and the stages that judge it."""

    iteration: int
    policy: str
    """Directory of its checkpoint; hf:ORG/NAME where it has not been downloaded."""
    stages: dict[str, str]
    """By stage, what its metrics' names begin with: nothing, or NAME/ of an evaluation of the user's own."""


class HookTask(msgspec.Struct, frozen=True):
    """One hook of one run."""

    hook: str
    function: str
    settings: dict[str, Any]
    kinds: list[str]
    """What it is to be told."""
    run: str
    grace_seconds: float
    evaluated: list[EvaluatedPolicy]


class Progress(msgspec.Struct):
    """How much of a run's files a hook has been told, in bytes."""

    events: int
    metrics: int

    @classmethod
    def of(cls, run: Path, hook: str) -> "Progress | None":
        """What is on the disk; None where there is nothing, or nothing that can be read."""
        try:
            return msgspec.json.decode(_file(run, hook).read_bytes(), type=cls)
        except (FileNotFoundError, ValueError):
            return None

    @classmethod
    def now(cls, run: Path) -> "Progress":
        """That of a hook which has been told all that there is."""
        return cls(_size(run / FILE), _size(run / METRICS))

    def save(self, run: Path, hook: str) -> None:
        """Keep it on the disk: after a kill, the next process goes on from here."""
        path = _file(run, hook)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, msgspec.json.encode(self), durable=False)


class ProgressFile:
    """Progress on the disk that changes with everything that a hook is told: it is written over in place, which takes
    a twentieth of the time of a file that takes the other's place, and no room on a full disk."""

    WIDTH = 64
    """Bytes: more than two numbers take, and few enough to be written as a whole or not at all."""

    def __init__(self, run: Path, hook: str, progress: Progress) -> None:
        progress.save(run, hook)
        self._file = _file(run, hook).open("r+b", buffering=0)

    def write(self, progress: Progress) -> None:
        """Keep this one."""
        os.pwrite(self._file.fileno(), msgspec.json.encode(progress).ljust(self.WIDTH), 0)


def _file(run: Path, hook: str) -> Path:
    return run / "hooks" / f"{hook}.json"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
