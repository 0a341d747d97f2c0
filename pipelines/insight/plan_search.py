"""`pipeline plan search`: searches for a plan for a run, and presents the result with its reasons."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from rich.console import Console
from rich.table import Table

from contracts.errors import UserError
from pipelines.config.cluster import MachinesSection
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.placement import PlacementSection
from pipelines.config.run import RunConfig
from pipelines.execution.profiling import predictor_for
from pipelines.insight.driver_time import local_driver_costs
from pipelines.insight.plan_simulation import require_known_gpus
from pipelines.iteration import build_graph
from pipelines.planning.cluster import (
    Cluster,
    cluster_of_machines,
    config_on_machines,
    configured_cluster,
    default_threads,
)
from pipelines.planning.memory import Device, device_of, format_bytes
from pipelines.planning.preflight import input_mistakes
from pipelines.planning.profiles.datasheets import sheet_of_machines
from pipelines.planning.profiles.predict import QUEUE_SECONDS, ProfilePredictor
from pipelines.planning.search.evaluation import ExpectedRun, SearchedRun
from pipelines.planning.search.finding import (
    CAUTIOUS,
    FOUND,
    SearchResult,
    adopt,
    differences,
    plans_of,
    search_plan,
)
from pipelines.planning.search.plan_file import planned_section
from pipelines.planning.search.plans import as_data
from pipelines.planning.simulation import DriverCosts
from pipelines.run.directory import RunDirectory
from pipelines.text import echo, format_duration, plural


@dataclass(frozen=True)
class PlanRow:
    """One plan, as a row of the table."""

    name: str
    seconds: float
    error: float
    """One standard deviation of `seconds`."""
    device_hours: float
    memory: int
    """Bytes on the fullest device."""
    idle: float
    bases: dict[str, float]
    """Share of the stages' time by the basis of its prediction."""


@dataclass(frozen=True)
class SearchView:
    """The results of a search with one lag."""

    lag: int
    iterations: int
    way: str
    """attached or detached, if the run's stages are jobs of a scheduler; else empty."""
    devices: str
    plans: list[PlanRow]
    impossible: dict[str, str]
    chosen: str
    reason: str
    gain: float | None
    """Seconds by which the found plan is expected to be faster than the best strategy."""
    gain_error: float | None
    """One standard deviation of `gain`."""
    chance: float | None
    """Share of the draws of prediction errors in which the found plan is faster."""
    changes: list[str]
    """How the found plan (or the cautious one, if that is chosen) differs from the best strategy."""
    space: int | None
    """The number of possible plans; None unless all of them were evaluated."""
    evaluated: int
    search_seconds: float
    in_time: bool
    """Whether the search ended before its time limit."""
    bound: float
    """Lower bound in seconds for any plan, over the searched iterations."""
    searched: float | None
    """Seconds of the found plan over the searched iterations."""
    left_out: dict[str, int]
    """Number of layouts that were left out, by reason."""
    out_of_room: int
    """Number of plans whose stages fit into memory one by one, but not together."""
    memory_unknown: list[str]
    """Roles whose memory is not known, which keep the config's layout."""
    found: dict[str, object] | None
    """The section `placement` of the found plan, whether it is chosen or not."""
    plan: dict[str, object]
    """The section `placement` of the chosen plan."""


def search_settings(
    config: RunConfig, iterations: int, machines: MachinesSection | None, runs: Sequence[RunDirectory]
) -> list[SearchedRun]:
    """The settings to search plans for: the run on this machine or on others, with the predictions for its stages.

    There are two if all stages are jobs of a scheduler: the run with a driver, and the detached one.

    Raises:
        UserError: there is no data sheet for the GPUs, an input of the run does not exist, or the type of the
            scheduler's GPUs is not known.
    """
    attached = _search_setting(config, iterations, machines, runs)
    kinds = {config.executor.entry(node).kind for node in attached.graph.nodes.values()}
    if not attached.is_jobs or kinds & set(LOCAL_KINDS):
        return [attached]
    return [attached, _search_setting(config, iterations, machines, runs, detached=True)]


def _search_setting(
    config: RunConfig,
    iterations: int,
    machines: MachinesSection | None,
    runs: Sequence[RunDirectory],
    *,
    detached: bool = False,
) -> SearchedRun:
    if machines is None:
        cluster: Callable[[RunConfig], Cluster] = configured_cluster
        predictor = predictor_for(config, runs=runs, detached=detached)
        device = device_of(config)
    else:
        sheet = sheet_of_machines(machines)
        cluster = partial(cluster_of_machines, section=machines)
        device = Device(f"{machines.total} {sheet.name}", sheet.memory, machines.total)
        predictor = predictor_for(config, runs=runs, device=sheet.name)
        predictor.sheet = sheet
    planned = config if machines is None else config_on_machines(config)
    graph = build_graph(planned, iterations)
    for mistake in input_mistakes(graph):
        raise mistake
    if detached:  # which submits all jobs at once
        planned = planned.model_copy(update={"executor": planned.executor.model_copy(update={"parallel": None})})
    setting = SearchedRun(
        config=planned,
        graph=graph,
        predictor=predictor,
        device=device,
        cluster_of=cluster,
        threads=default_threads(planned.executor),
        driver=DriverCosts() if detached else local_driver_costs(config, runs) or DriverCosts(),
        detached=detached,
    )
    return replace(setting, device=_scheduler_device(setting, predictor)) if setting.is_jobs else setting


def _scheduler_device(setting: SearchedRun, predictor: ProfilePredictor) -> Device:
    """The device of a scheduler's jobs: from the config key `hardware`, else from the data sheet of the devices that
    earlier jobs had. Its memory is 0 bytes where it is not known.

    Raises:
        UserError: the jobs ask for GPUs of an unknown type.
    """
    kind, hardware = setting.config.executor.kind, setting.config.hardware
    name = f"{kind}, {predictor.device}"
    if not predictor.has_seen(kind):
        name += (
            f" (none of its jobs has been measured: {format_duration(QUEUE_SECONDS)} in the queue are assumed for each)"
        )
    if not setting.on_gpu:
        return Device(name, 0, 0)
    require_known_gpus(setting.config, setting.cluster_of(setting.config), predictor)
    room = predictor.sheet.memory if hardware is None else int(hardware.gib * (1 << 30))
    return Device(name, room, 1)


def run_search(
    setting: SearchedRun, *, seed: int, seconds: float, take: str | None = None
) -> tuple[SearchView, PlacementSection]:
    """Search for a plan. Returns the results, and the section `placement` of the chosen plan.

    Args:
        setting: the run and the machines to search for.
        seed: seed of the search, and of the draws of prediction errors.
        seconds: time limit of the search.
        take: name of the plan to choose, instead of the one that the search would choose.

    Raises:
        UserError: a stage's duration is not known, no plan fits, or there is no plan named `take`.
    """
    answer = search_plan(setting, seed=seed, seconds=seconds)
    if take is not None:
        answer = adopt(answer, take)
    section = planned_section(answer, setting, seed)
    best = min(answer.fixed.values(), key=lambda run: run.seconds, default=None)
    comparison = answer.comparison
    runs = plans_of(answer.fixed, answer.found, answer.cautious)
    new = answer.cautious if answer.name == CAUTIOUS else answer.found
    view = SearchView(
        lag=setting.graph.lag,
        iterations=max((node.iteration or 0 for node in setting.graph.nodes.values()), default=0),
        way="" if not setting.is_jobs else "detached" if setting.detached else "attached",
        devices=setting.device.name,
        plans=[_row(name, run, answer) for name, run in runs.items()],
        impossible=dict(answer.impossible),
        chosen=answer.name,
        reason=answer.reason,
        gain=comparison.gain if comparison is not None else None,
        gain_error=comparison.error if comparison is not None else None,
        chance=comparison.win_share if comparison is not None else None,
        changes=differences(new, best) if new is not None and best is not None else [],
        space=answer.finding.space,
        evaluated=answer.finding.evaluated,
        search_seconds=answer.finding.seconds,
        in_time=answer.finding.in_time,
        bound=answer.bound,
        searched=answer.searched_seconds,
        left_out=dict(answer.left_out),
        out_of_room=answer.out_of_room,
        memory_unknown=list(answer.memory_unknown),
        found=as_data(answer.found.section) if answer.found is not None else None,
        plan=as_data(section),
    )
    return view, section


def _row(name: str, run: ExpectedRun, answer: SearchResult) -> PlanRow:
    return PlanRow(
        name=name,
        seconds=run.seconds,
        error=answer.errors[name],
        device_hours=run.device_hours,
        memory=run.memory,
        idle=run.idle,
        bases=run.bases,
    )


def fastest(views: Sequence[SearchView]) -> int:
    """The index of the search whose chosen plan takes least time; of equal ones, the one with the smallest lag."""
    return min(range(len(views)), key=lambda number: (_chosen_row(views[number]).seconds, views[number].lag))


def _chosen_row(view: SearchView) -> PlanRow:
    return next(row for row in view.plans if row.name == view.chosen)


def print_search(console: Console, view: SearchView) -> None:
    """Print a table of the plans, which of them to take, and why."""
    lag = f", lag {view.lag}" if view.lag else ""
    way = f", {view.way}" if view.way else ""
    echo(console, f"{plural(view.iterations, 'iteration')} on {view.devices}{lag}{way}")
    table = Table("plan", "takes", "±", "device-hours", "memory", "idle", "known by")
    for row in sorted(view.plans, key=lambda row: (row.name in (CAUTIOUS, FOUND), row.seconds)):
        table.add_row(
            row.name,
            format_duration(row.seconds),
            format_duration(row.error),
            f"{row.device_hours:.3g}",
            format_bytes(row.memory) if row.memory else "",
            f"{row.idle:.0%}",
            ", ".join(f"{basis} {share:.0%}" for basis, share in row.bases.items() if share >= 0.005),
        )
    console.print(table)
    for name, reason in view.impossible.items():
        echo(console, f"{name} is not possible: {reason}")
    echo(console, f"take {view.chosen}: {view.reason}.")
    if view.changes:
        which = CAUTIOUS if view.chosen == CAUTIOUS else FOUND
        echo(
            console, f"the {which} plan, compared with the best strategy:", *(f"  {change}" for change in view.changes)
        )
    echo(console, *_search_notes(view))


def _search_notes(view: SearchView) -> list[str]:
    """Sentences on how thorough the search was, and what it left out."""
    if view.space is not None:
        lines = [f"all {plural(view.space, 'plan')} were evaluated, in {format_duration(view.search_seconds)}"]
    else:
        lines = [f"{plural(view.evaluated, 'plan')} were evaluated, in {format_duration(view.search_seconds)}"]
    if not view.in_time:
        lines[0] += "; the search ran out of time: with more of it (--seconds) it may find better ones"
    if view.searched is not None:
        lines.append(
            f"no plan can take less than {format_duration(view.bound)} for the iterations that were searched; "
            f"the found one takes {format_duration(view.searched)}"
        )
    for reason, count in view.left_out.items():
        lines.append(f"left out: {plural(count, 'layout')}, {reason}")
    if view.out_of_room:
        lines.append(f"left out: {plural(view.out_of_room, 'plan')}, whose concurrent stages need too much memory")
    if view.memory_unknown:
        lines.append(
            f"the memory of {', '.join(view.memory_unknown)} is not known: their layouts are left as configured"
        )
    least = min(_chosen_row(view).bases, key=("analytic", "scaled", "measured").index, default="measured")
    if least == "analytic":
        lines.append(
            "some durations are known from data sheets alone: run one iteration, and search again with its measurements"
        )
    return lines


def as_json(views: Sequence[SearchView], taken: int) -> str:
    """All searches as one JSON object, with the index of the chosen one."""
    return json.dumps({"taken": taken, "searches": [asdict(view) for view in views]}, indent=1)


def parse_lags(text: str) -> list[int]:
    """Parse the lags of `--lags`, ascending and without repetitions.

    Raises:
        UserError: one of them is not a number from 0 on.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--lags is {text!r}; it must be numbers from 0 on, with commas: --lags 0,1.")
    return sorted({int(word) for word in words})
