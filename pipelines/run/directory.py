"""The directory of a run: its owner, its lock, and its layout."""

import contextlib
import datetime
import fcntl
import functools
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from contracts import yaml_text
from contracts.config import read_yaml, validate
from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.locks import locked, try_lock
from pipelines.config.recipes import PREFIX, origin_of
from pipelines.config.run import RunConfig
from pipelines.run.events import FILE, Event, EventStream

PINNED = "pinned"
UNPUBLISHED = ("logs", "hooks", "tracking")
"""Folders of a run that hold no artifacts."""
COMMITS = "hub"
"""Entry of run.json: the commits that names on the Hub resolve to."""
CANCEL = "cancel"
"""File that asks the run's driver to end, on any machine."""


class RunDirectory:
    """The directory `path` of a run, which holds all of its artifacts, logs and events, and those of no other run."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.stream = EventStream(self.path / FILE)
        self._lock: IO[str] | None = None

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """The directory of an existing run; raises UserError if it is none."""
        cls(path).require_files()
        if not (path / "run.json").is_file():
            raise UserError(f"{path} is not the directory of a run (it has no run.json). Give the path runs/NAME.")
        return cls(path)

    def require_files(self) -> None:
        """Raise UserError if one of the run's own files is not a regular file."""
        for name in ("run.json", "config.resolved.yaml", "lock", FILE, "metrics.jsonl", PINNED):
            path = self.path / name
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise UserError(f"{path} is not a regular file, but a run writes its {name} there. Move it away.")

    def claim(self, config: RunConfig, source: Path, iterations: int, commits: dict[str, str] | None = None) -> None:
        """Create the directory or open an existing run's, and become its only driver until this process ends.

        Args:
            commits: the commits that names on the Hub resolve to in this run.

        Raises:
            UserError: it belongs to another config file or is not a run's, or another driver is alive.
        """
        marker = self.path / "run.json"
        self.require_files()
        if self.path.exists() and not marker.exists() and not self._is_run():
            raise UserError(
                f"{self.path} exists and was not created by a run of Ratchet. Choose another name=... or directory=..."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # below /proc, for example
            raise UserError(f"{self.path} cannot be created: {error.strerror}. Set directory=PATH.") from error
        self.lock()
        origin = origin_of(source, self.path)
        if marker.exists():
            owner = self._entry("config")
            if owner != origin and self._entry("source") != str(source.absolute()):
                shown = owner if owner.startswith(PREFIX) else (self.path / owner).resolve()
                raise UserError(
                    f"{self.path} is the run of {shown}, not of {source}. Choose another name=... for this run."
                )
        record: dict[str, Any] = {"config": origin, "source": str(source.absolute())}
        record |= {"iterations": iterations, "settings": config.settings()}
        record |= {COMMITS: commits} if commits is not None else {}
        write_atomically(marker, json.dumps(record).encode())
        resolved = {**config.model_dump(mode="json"), "directory": str(self.path.parent)}
        text = yaml_text.dump(resolved)
        write_atomically(self.path / "config.resolved.yaml", text.encode())

    def _is_run(self) -> bool:
        """Whether a driver has created it, even if run.json is lost or not written yet; true for an empty directory."""
        names = {path.name for path in self.path.iterdir()}
        begun = all(name == "lock" or name.startswith("run.json.") for name in names)
        return begun or names >= {"lock", "config.resolved.yaml"}

    def lock(self) -> None:
        """Take the run's lock until this process ends; only its holder may change the run.

        Raises:
            UserError: another process holds it.
        """
        self._lock = (self.path / "lock").open("a+", encoding="utf-8", errors="replace")
        deadline = time.monotonic() + 1.0  # `pipeline status` briefly takes the lock to see whether it is free
        while not try_lock(self._lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                self._lock.seek(0)
                holder = self._lock.read().strip() or "unknown"
                raise UserError(
                    f"the run {self.path} is being driven right now by {holder}. Wait for it, or stop that process; "
                    "`pipeline status` shows its progress."
                )
            time.sleep(0.05)
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        self._lock.flush()
        (self.path / CANCEL).unlink(missing_ok=True)
        self.stream.drop_torn_line()

    def submit_lock(self) -> contextlib.AbstractContextManager[None]:
        """A lock across machines for submitting the run's jobs, changing their dependencies, or ending them."""
        return locked(self.path / "submit.lock")

    def clear_scratch(self) -> None:
        """Delete temporary files of killed processes. Call it only while no process works on the run."""
        places = (self.path.glob("*.tmp"), self.path.glob("report.samples/*.tmp"), (self.path / "logs").rglob("*.tmp"))
        for path in [path for place in places for path in place]:
            path.unlink(missing_ok=True)

    def holder(self) -> str | None:
        """The process that holds the run's lock, or None."""
        if not (self.path / "lock").exists():
            return None
        with (self.path / "lock").open(encoding="utf-8", errors="replace") as file:
            return None if try_lock(file, fcntl.LOCK_SH) else file.read().strip()

    @property
    def pinned(self) -> bool:
        """Whether retention and gc are suspended."""
        return (self.path / PINNED).exists()

    def pin(self, *, off: bool = False) -> None:
        """Suspend retention and gc, or resume them if `off`."""
        if off:
            (self.path / PINNED).unlink(missing_ok=True)
        else:
            write_atomically(self.path / PINNED, time.strftime("%F %T\n").encode())

    @functools.cached_property
    def config(self) -> RunConfig:
        """The config of the last command, read once."""
        place = {"name": self.path.name, "directory": str(self.path.parent)}
        return validate(RunConfig, {**self._entry("settings"), **place}, str(self.path / "run.json"))

    @property
    def iterations(self) -> int:
        """Number of iterations that the last command asked for."""
        return int(self._entry("iterations"))

    def _entry(self, name: str) -> Any:
        """Read one entry of run.json."""
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))[name]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({name}: {error}). Delete it; the next `pipeline run` writes it again."
            ) from error

    def record(self, event: Event) -> None:
        """Append an event to the stream."""
        self.stream.append(event)

    def events(self) -> list[Event]:
        """All recorded events, in order."""
        return self.stream.read()

    def new_attempt(self, stage: str) -> Path:
        """Create the directory for the logs of a new attempt at a stage."""
        folder = self.path / "logs" / stage
        attempt = folder / f"attempt-{max(map(_number, self._attempts(stage)), default=0) + 1}"
        attempt.mkdir(parents=True)
        return attempt

    def stage_of(self, attempt: Path) -> str:
        """The stage that an attempt belongs to."""
        return attempt.parent.relative_to(self.path / "logs").as_posix()

    def attempts(self, stage: str) -> list[Path]:
        """The attempts at a stage, oldest first."""
        return sorted((path for path in self._attempts(stage) if path.is_dir()), key=_number)

    def _attempts(self, stage: str) -> list[Path]:
        """Paths named like attempts; logs/ may hold other files that users put there."""
        return [path for path in (self.path / "logs" / stage).glob("attempt-*") if path.name[8:].isdecimal()]


def _number(attempt: Path) -> int:
    return int(attempt.name.rpartition("-")[2])


def recorded_commits(config: RunConfig) -> dict[str, str] | None:
    """The commits that the run's names on the Hub resolve to: {} for a new run, None if it did not record them."""
    marker = config.run_directory / "run.json"
    if not marker.is_file():
        return {}
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # damaged: `claim` reports it
    return found.get(COMMITS) if isinstance(found, dict) else {}


def dated(config: RunConfig) -> RunConfig:
    """The config with a date: the user's, else that of the existing run, else today's."""
    if config.date is not None:
        return config
    date = None
    if (config.run_directory / "run.json").is_file():
        date = RunDirectory(config.run_directory)._entry("settings").get("date")
    elif (config.run_directory / "config.resolved.yaml").is_file():  # where run.json was lost
        date = read_yaml(config.run_directory / "config.resolved.yaml").get("date")
    return config.model_copy(update={"date": date or datetime.date.today().isoformat()})
