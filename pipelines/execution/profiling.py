"""Builds profiles from the files of runs: manifests, attempts, and the supervisors' records."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.errors import TransientError, UserError
from contracts.hardware import processor
from contracts.manifest import MANIFEST
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.run import RunConfig
from pipelines.execution.attempts import decision_of
from pipelines.execution.endings import PUBLISHER, parts_of
from pipelines.execution.supervisor import DECISION, REQUEST, request_of
from pipelines.graph import Graph, Node
from pipelines.iteration import build_graph
from pipelines.machine import cores, gpu_count
from pipelines.planning.cluster import cluster_of, default_threads
from pipelines.planning.placement import placed_if_possible
from pipelines.planning.profiles.datasheets import DataSheet, device_here
from pipelines.planning.profiles.predict import ProfilePredictor
from pipelines.planning.profiles.rows import Profile, Timing, profile_of, start_states
from pipelines.planning.profiles.store import ProfileStore
from pipelines.run.directory import RunDirectory
from pipelines.run.events import StagePublished, StageStarted

THREADS = "OMP_NUM_THREADS"


def timing_of(node: Node, graph: Graph, attempt: Path, published: float) -> Timing | None:
    """The timing of an attempt that has published, from its files.

    Args:
        published: time of publication in seconds since 1970.

    Returns:
        None if files are missing, or if the attempt continued an earlier one.
    """
    if _continues_earlier(attempt):
        return None
    try:
        asked = min((attempt / name).stat().st_mtime for name in (DECISION, REQUEST))  # a job decides at its start
        threads = request_of(attempt).environment.get(THREADS, "")
        parts = parts_of(attempt)
        ends = [json.loads((part / "exit.json").read_bytes()) for part in parts]
        started = min(float(end["started"]) for end in ends)
        tasks = [end for end, part in zip(ends, parts, strict=True) if part.name != PUBLISHER]
        ended = max(float(end["ended"]) for end in tasks or ends)
    except (OSError, ValueError, KeyError, TypeError, TransientError):
        return None
    inputs = [graph.nodes[need].output / MANIFEST for need in node.needs]
    ready = max([asked, *(path.stat().st_mtime for path in inputs if path.exists())])
    return Timing(
        queue=max(0.0, started - ready),
        life=max(0.0, ended - started),
        lag=max(0.0, published - ended),
        tasks=max(1, len(tasks)),
        is_array=len(tasks) < len(parts),
        threads=int(threads) if threads.isdecimal() else 0,
    )


def _continues_earlier(attempt: Path) -> bool:
    """Whether an earlier attempt may have made a part of this attempt's output."""
    name, _, number = attempt.name.rpartition("-")
    before = attempt.with_name(f"{name}-{int(number) - 1}")
    own, earlier = decision_of(attempt), decision_of(before)
    return own is not None and earlier is not None and (own.key, own.hidden_key) == (earlier.key, earlier.hidden_key)


def profiles_of(run: RunDirectory) -> list[Profile]:
    """The profiles of the stages that a run has executed itself and whose files still exist."""
    graph = placed_if_possible(build_graph(run.config, run.iterations), cluster_of(run.config))
    started: dict[str, tuple[str, float]] = {}
    published: dict[str, tuple[str, float]] = {}
    for event in run.events():
        if isinstance(event, StageStarted):
            started[event.stage] = event.attempt, event.time
        elif isinstance(event, StagePublished) and event.stage in started:
            published[event.stage] = started[event.stage][0], event.time
    begun = _beginnings(graph, run.config)
    found = (
        _profile(graph.nodes[stage], graph, run.path / "logs" / stage / attempt, time, run.config, begun[stage])
        for stage, (attempt, time) in published.items()
        if stage in graph.nodes
    )
    return [row for row in found if row is not None]


def _beginnings(graph: Graph, config: RunConfig) -> dict[str, tuple[bool, bool]]:
    return start_states(graph, cluster_of(config).parallel)


def _profile(
    node: Node, graph: Graph, attempt: Path, published: float, config: RunConfig, begun: tuple[bool, bool]
) -> Profile | None:
    try:
        manifest = Artifact.open(node.output).manifest
    except UserError:  # deleted or damaged; `verify` reports it
        return None
    timing = timing_of(node, graph, attempt, published)
    if timing is None:
        return None
    return profile_of(node, graph, manifest, timing, str(config.executor.entry(node).kind), begun)


class ProfileRecorder:
    """Appends profiles of a run's stages to the store as they are published."""

    def __init__(self, graph: Graph, config: RunConfig) -> None:
        self._graph = graph
        self._config = config
        self._nodes: Mapping[str, Node] = {}
        self._begun: dict[str, tuple[bool, bool]] = {}

    def add(self, node: Node, attempt: Path, published: float) -> None:
        """Append the profile of a stage that has just been published.

        Raises:
            OSError, TransientError: the store cannot be written.
        """
        store = ProfileStore()
        if not store.is_kept:
            return
        if self._nodes is not self._graph.nodes:  # on the first call, and after a rollback
            self._nodes, self._begun = self._graph.nodes, _beginnings(self._graph, self._config)
        profile = _profile(node, self._graph, attempt, published, self._config, self._begun[node.name])
        if profile is not None:
            store.append([profile])


def threads_of(node: Node, config: RunConfig) -> int:
    """Threads per process of a stage, on this machine or in a scheduler's jobs."""
    given = config.environments.of(node.environment).variables.get(THREADS) or os.environ.get(THREADS, "")
    if given.isdecimal():
        return int(given)
    entry = config.executor.entry(node)
    if entry.kind in LOCAL_KINDS:
        return default_threads(config.executor)
    layout = node.stage.layout(node.config)
    return max(1, (entry.cpus or 1) // max(1, layout.processes // layout.nodes))


def predictor_for(
    config: RunConfig,
    *,
    runs: Iterable[RunDirectory] = (),
    device: str = "",
    sheet: DataSheet | None = None,
    stored: bool = True,
    detached: bool = False,
) -> ProfilePredictor:
    """A predictor for a run's stages, from the store, the run itself if it has begun, and other runs.

    Args:
        device: device that stages with models compute on: the name of a data sheet, a GPU or a processor. By default
            this machine's, or that of the latest job if all of these stages run as jobs of a scheduler.
        sheet: its data sheet, if it differs from the standard one, for example in its links.
        stored: whether to read the store.
        detached: whether the run is detached.
    """
    profiles = list(_profiles(config, runs, stored=stored))
    if not device and config.executor.is_remote:
        device = device_of_jobs(profiles, config)
    return ProfilePredictor(
        profiles,
        device or device_here(),
        processor=None if device else processor(),
        sheet=sheet,
        threads=lambda node: threads_of(node, config),
        parallel=cluster_of(config).parallel,
        warm=config.executor.warm,
        cores=None if device or gpu_count() else cores(),
        detached=detached,
    )


def device_of_jobs(profiles: Iterable[Profile], config: RunConfig) -> str:
    """The device of the latest job that computed with a model; empty if there is none."""
    kind = str(config.executor.kind)
    jobs = [row for row in profiles if row.executor == kind and row.work is not None]
    return max(jobs, key=lambda row: row.created).device if jobs else ""


def _profiles(config: RunConfig, runs: Iterable[RunDirectory], *, stored: bool) -> Iterator[Profile]:
    if stored:
        yield from ProfileStore().read()
    if (config.run_directory / "run.json").is_file():
        yield from profiles_of(RunDirectory(config.run_directory))
    for run in runs:
        yield from profiles_of(run)
