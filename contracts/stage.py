"""Runs a stage from the command line: reads the config, computes the stage key, reuses or computes, publishes.

People, bash scripts and the driver use the same command line:

    python -m generation --config generation.yaml policy=models/sft output=out seed=1
"""

import argparse
import contextlib
import faulthandler
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import msgspec

from contracts import entrypoint, stopping
from contracts.artifacts import Artifact, input_damage, input_digest, is_published
from contracts.attempt import ATTEMPT, ROLE, fail, report_metrics, report_progress, supervised
from contracts.config import Parser, Role, StageConfig, apply_overrides, describe, read_yaml, validate
from contracts.declaration import Stage, load
from contracts.errors import UserError
from contracts.files import exists_uncached
from contracts.fingerprint import digest
from contracts.following import MatchesInput, hidden_key, producer_key, producer_of
from contracts.hardware import begin_measuring
from contracts.manifest import MANIFEST
from contracts.nested import flatten
from contracts.processes import die_with_parent
from contracts.publication import Publication
from contracts.versions import FURTHER, installed_versions, source_version

MINIMUM_FREE = 16 << 20
LOCK_SECONDS = 120.0
"""How long a supervised stage waits for another process that writes the same output: longer than the lease of a dead
machine's lock (90 s with NFS)."""

WorkerRole = Literal["replica", "task", "publisher"]
"""replica: computes shards for its parent process. task: one of several independent jobs that share the stage's shards.
publisher: publishes the shards that tasks have computed, and computes none."""


class Outcome(msgspec.Struct):
    """The result of a stage's `run`, for its manifest."""

    unit: str
    """The unit that the ledger counts: prompts, samples, pairs."""
    facts: dict[str, Any] = {}
    weights: str | None = None
    note: str = ""
    """Appended to the counts in the stage's last line of output."""


class Context:
    """Passed to a stage's `run` along with its config: the publication, this process's role, timers and reports."""

    def __init__(self, publication: Publication, rank: int, world_size: int, role: WorkerRole | None = None) -> None:
        self.publication = publication
        self.rank = rank
        self.world_size = world_size
        self.role = role
        self.seconds: dict[str, float] = {}

    @property
    def publishes(self) -> bool:
        """Whether this process is the one that publishes; `run` needs no outcome in the others."""
        return self.rank == 0 and self.role in (None, "publisher")

    @property
    def traces(self) -> Path:
        """Folder for profiler traces: in the attempt's directory, or next to the output of a stage that is run by hand.
        Traces are never published."""
        attempt, target = os.environ.get(ATTEMPT), self.publication.target
        return Path(attempt, "traces") if attempt else target.with_name(f"{target.name}.traces")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the manifest under `name`: load, compute, save."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report progress to the supervisor; cheap enough for every step."""
        if self.rank == 0 or self.role is not None:
            report_progress(done, total, unit)

    def report_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the metrics of an optimizer step, counted from 1, before its state is saved."""
        if self.rank == 0:
            report_metrics("step", step, metrics)

    def report_shard(self, name: str, metrics: Mapping[str, float]) -> None:
        """Report the metrics of a shard that this process has computed, before it is committed."""
        report_metrics("shard", int(Path(name).stem.rpartition("-")[2]), metrics)


def key_parts(
    config: StageConfig,
    versions: dict[str, str],
    where: Callable[[Path], Path] = lambda path: path,
    followed: str | None = None,
) -> dict[str, Any]:
    """Everything that the stage key depends on; stored in the manifest, to explain why two keys differ.

    Args:
        where: maps an input's path in the config to its current path.
        followed: the input that is not published yet; it is left out.
    """
    inputs = {name: value for name, value in _flat(config.select(Role.INPUT)).items() if name != followed}
    others = set(FURTHER).difference(config.further_libraries)
    return {
        "stage": config.stage,
        "code": config.code_version,
        "config": json.loads(json.dumps(config.select(Role.IDENTITY), default=str)),
        "inputs": {name: _digests(value, where) for name, value in inputs.items()},
        "sources": {name: input_digest(path) for name, path in config.source_files().items()},
        "versions": {name: version for name, version in versions.items() if name not in others},
    }


def stage_key(parts: dict[str, Any]) -> str:
    """The stage key: a digest of `key_parts`."""
    return digest(parts)


def _flat(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flatten(inputs).items() if value is not None}


def _digests(value: Any, where: Callable[[Path], Path]) -> Any:
    if isinstance(value, list):
        return [_digests(item, where) for item in value]
    return input_digest(value if str(value).startswith("hf:") else where(Path(value)))


def main(stages: dict[str, Stage[Any]], package: str, argv: list[str] | None = None) -> NoReturn:
    """Run one stage from the command line, and exit.

    The exit code is 0 if it has published or reused, 2 for a user's mistake, 128 + N if signal N stopped it, 141 if the
    reader of its output has gone, and 1 for any other failure.
    """
    die_with_parent()
    stopping.listen()
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # the supervisor gets a stack dump of a stalled stage
    code = 0
    try:
        stage, config = _parse(stages, package, sys.argv[1:] if argv is None else argv)
        run_stage(stage, config)
    except (Exception, KeyboardInterrupt, stopping.Stopped) as error:
        gone = isinstance(error, BrokenPipeError) and entrypoint.output_is_closed()
        code = entrypoint.PIPE_GONE if gone else fail(stopping.as_stop(error))
    except SystemExit as end:  # from argparse, or from a launcher whose processes have reported why they failed
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    entrypoint.finish(code)


def run_stage(stage: Stage[Any], config: StageConfig) -> Artifact | None:
    """Compute and publish the output of a stage, or reuse it; returns None in processes that do not publish."""
    start = time.perf_counter()
    begin_measuring()
    source = source_version(stage.run.partition(".")[0])  # before the code is loaded
    field = stage.follows(config)
    path = None if field is None else Path(getattr(config, field))
    # The field of an input that is not published yet; its digest, and so this stage's key, is known only at the end.
    followed = (
        field if path is not None and producer_of(path) is not None and not exists_uncached(path / MANIFEST) else None
    )
    parts = key_parts(config, installed_versions(), followed=followed)
    key = None if followed else stage_key(parts)
    publication = Publication(
        config.output,
        stage.schema,
        config.stage,
        key,
        hidden_key=hidden_key(parts, field, None if path is None else producer_key(path)),
        fits=None if path is None else MatchesInput(path),
    )
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    context = Context(publication, rank, world_size, _worker_role())
    if stage.is_worker_node is not None and load(stage.is_worker_node)(config):
        assert stage.launch is not None
        if not _is_published(publication) and not publication.complete:
            load(stage.launch)(config)
        return None
    if _is_published(publication):
        if context.publishes:
            publication.clear()
        return _reuse(stage, context)
    if stage.launch is not None and not publication.complete and load(stage.launch)(config):
        return Artifact.open(config.output, stage.schema)
    check = None
    if context.publishes or context.role == "task":
        config.output.parent.mkdir(parents=True, exist_ok=True)
        require_space(config.output.parent, "output")
        if context.publishes:
            publication.begin(LOCK_SECONDS if supervised() else 0)
        else:
            publication.join(LOCK_SECONDS)
        complete = publication.complete  # before the next check: another process may publish in between
        if _is_published(publication):  # by another process, before this one had the lock
            publication.clear()
            return _reuse(stage, context)
        if complete:
            return publication.finish() if context.publishes else None
        whole = [given for given in config.input_paths() if not followed or given != path]
        check = InputCheck(whole) if context.publishes else None
    context.seconds["prepare"] = time.perf_counter() - start
    try:
        with context.timed("import"):
            run = load(stage.run)
        entrypoint.imported()
        outcome: Outcome = run(config, context)
        if check is None:
            return None
        with context.timed("check"):
            check.require_whole()
            if followed and path is not None:
                InputCheck([path]).require_whole()
        if followed and path is not None:
            given = dict.fromkeys(_flat(config.select(Role.INPUT)))  # keeps the order of the inputs
            parts["inputs"] = {**given, **parts["inputs"], followed: input_digest(path)}
            publication.key = stage_key(parts)
            if _is_published(publication):
                publication.discard()
                return _reuse(stage, context)
    except Exception as error:
        if context.role == "task" and not isinstance(error, UserError):
            check = InputCheck(config.input_paths())
        if check is not None and not isinstance(error, UserError):
            check.require_whole()  # a damaged input is the better explanation
        if context.publishes and isinstance(error, UserError):
            publication.abandon()
        raise
    context.seconds["total"] = time.perf_counter() - start
    artifact = publication.publish(
        key_parts=parts,
        inputs=parts["inputs"],
        input_paths=json.loads(json.dumps(_flat(config.select(Role.INPUT)), default=str)),
        unit=outcome.unit,
        weights=outcome.weights,
        versions={"ratchet": source, **parts["versions"]},
        seconds=context.seconds,
        facts=outcome.facts,
    )
    print("; ".join(filter(None, (f"published {config.output}: {artifact.manifest.ledger}", outcome.note))))
    return artifact


def _worker_role() -> WorkerRole | None:
    role = os.environ.get(ROLE) or None
    if role not in (None, *get_args(WorkerRole)):
        raise UserError(f"{ROLE}={role} is none of {', '.join(get_args(WorkerRole))}. Correct or unset it.")
    return role  # type: ignore[return-value]


def _is_published(publication: Publication) -> bool:
    return publication.key is not None and is_published(publication.target, publication.key)


def _reuse(stage: Stage[Any], context: Context) -> Artifact:
    publication = context.publication
    if (context.publishes or context.role == "task") and publication.key is not None:
        print(f"reuse {publication.target}: already published under key {publication.key[:12]}")
    return Artifact.open(publication.target, stage.schema)


class InputCheck:
    """Verifies the published inputs of a stage against their manifests, in a thread while the stage computes.

    So corruption cannot spread from stage to stage. This takes no extra time: hashing is faster than loading a model.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._problems: list[str] = []
        self._error: Exception | None = None
        self._paths = paths
        self._thread = threading.Thread(target=self._run, name="input check", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for path in self._paths:
                self._problems += input_damage(path)
        except Exception as error:
            self._error = error

    def require_whole(self) -> None:
        """Wait for the end of the check.

        Raises:
            UserError: an input is damaged, or files that this stage needs were deleted by `pipeline gc`.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._problems:
            raise UserError(
                f"an input is damaged: {'; '.join(self._problems[:3])}. Delete the directory that holds it and run "
                "the same command again, which recomputes it; `pipeline verify RUN` checks everything."
            )


def _parse(stages: dict[str, Stage[Any]], package: str, argv: list[str]) -> tuple[Stage[Any], StageConfig]:
    parser = Parser(prog=f"python -m {package}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.keys = functools.partial(_describe, stages, argv[0] if argv else None)
    only = next(iter(stages)) if len(stages) == 1 else None
    if only is not None and argv[:1] == [only]:  # `python -m contracts prompts ...` and `python -m generation ...`
        argv = argv[1:]
    if only is None:
        parser.add_argument("stage", choices=sorted(stages))
    parser.add_argument("--config", type=Path, help="YAML file with the stage's keys")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys set or changed on the command line")
    options = parser.parse_intermixed_args(argv)
    stage = stages[only or options.stage]
    data = apply_overrides(read_yaml(options.config) if options.config else {}, options.overrides)
    source = str(options.config) if options.config else f"python -m {package}"
    return stage, validate(stage.config, data, source)


def _describe(stages: dict[str, Stage[Any]], chosen: str | None) -> str:
    """Describe the keys of the chosen stage, or of all stages."""
    shown = {chosen: stages[chosen]} if chosen in stages else stages
    return "\n".join(f"{name}: {describe(stage.config)}" for name, stage in shown.items())


def require_space(directory: Path, key: str) -> None:
    """Raise UserError if the disk of an existing directory is full; `key` is the config key of the directory."""
    free = shutil.disk_usage(directory).free
    if free < MINIMUM_FREE:
        raise UserError(
            f"only {free >> 20} MiB are free on the disk of {directory}; at least {MINIMUM_FREE >> 20} MiB are needed. "
            f"Free some space, or set {key}=PATH on another disk."
        )
