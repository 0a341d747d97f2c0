"""The task of a hook's process, and its progress. This module imports little, so that the process starts fast."""

import os
from pathlib import Path
from typing import Any

import msgspec

from contracts.files import write_atomically
from contracts.points import METRICS
from pipelines.run.events import FILE


class EvaluatedPolicy(msgspec.Struct, frozen=True):
    """A policy of the run, and the stages that evaluate it."""

    iteration: int
    policy: str
    """Directory of its checkpoint; hf:ORG/NAME where it has not been downloaded."""
    stages: dict[str, str]
    """The prefix of each stage's metrics: empty, or NAME/ for an evaluation with the user's own function."""


class HookTask(msgspec.Struct, frozen=True):
    """One hook of one run."""

    hook: str
    function: str
    settings: dict[str, Any]
    kinds: list[str]
    """The kinds of happenings that the function is called with."""
    run: str
    grace_seconds: float
    evaluated: list[EvaluatedPolicy]


class Progress(msgspec.Struct):
    """Bytes of a run's files that a hook has processed."""

    events: int
    metrics: int

    @classmethod
    def of(cls, run: Path, hook: str) -> "Progress | None":
        """The progress on the disk; None where there is none, or it cannot be read."""
        try:
            return msgspec.json.decode(_file(run, hook).read_bytes(), type=cls)
        except (FileNotFoundError, ValueError):
            return None

    @classmethod
    def now(cls, run: Path) -> "Progress":
        """The progress of a hook that has processed everything so far."""
        return cls(_size(run / FILE), _size(run / METRICS))

    def save(self, run: Path, hook: str) -> None:
        """Write it to the disk, for the next process to continue from."""
        path = _file(run, hook)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, msgspec.json.encode(self), durable=False)


class ProgressFile:
    """Writes the progress after every call, in place: that takes a twentieth of the time of an atomic replacement, and
    no room on a full disk."""

    WIDTH = 64
    """Bytes written at a time: more than two numbers take, and few enough for an atomic write."""

    def __init__(self, run: Path, hook: str, progress: Progress) -> None:
        progress.save(run, hook)
        self._file = _file(run, hook).open("r+b", buffering=0)

    def write(self, progress: Progress) -> None:
        """Overwrite the progress on the disk."""
        os.pwrite(self._file.fileno(), msgspec.json.encode(progress).ljust(self.WIDTH), 0)


def _file(run: Path, hook: str) -> Path:
    return run / "hooks" / f"{hook}.json"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
