"""Commands that start, continue or stop runs: run, fork, sweep, attach, cancel."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from contracts.config import describe
from contracts.entrypoint import INTERRUPTED
from contracts.errors import RunStoppedError, UserError
from contracts.manifest import MANIFEST
from contracts.preflight import refuse
from contracts.stage import require_space
from pipelines.commands.declaring import (
    CONFIG,
    ITERATIONS,
    OVERRIDES,
    RUN,
    argument,
    command,
    make_console,
    open_run,
)
from pipelines.config.executor import ExecutorSection, ResourcesSection
from pipelines.config.load import load_run_config
from pipelines.config.recipes import find_config
from pipelines.config.run import RunConfig
from pipelines.environments.paths import require_home
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Executors, Site
from pipelines.insight.compare.command import as_json, print_comparison
from pipelines.insight.compare.gather import compare
from pipelines.insight.display import Display
from pipelines.insight.hooks.configured import check_hooks, initialize_hooks
from pipelines.insight.listeners import listeners_of
from pipelines.insight.tables import print_table
from pipelines.insight.watch import attach, cancel
from pipelines.job import ENTRY
from pipelines.planning.entries import check_entries
from pipelines.planning.inspection import preflight
from pipelines.planning.memory import print_memory
from pipelines.planning.preflight import check_environments, require_possible
from pipelines.run.directory import RunDirectory
from pipelines.run.force import report_forced, resolve, set_aside
from pipelines.run.fork import fork
from pipelines.run.gates import stop_decision
from pipelines.run.plan import plan_run
from pipelines.run.sharing import SharedArtifacts
from pipelines.run.sweep import LOCATION_KEYS, grid
from pipelines.run.verdicts import reused, verdicts
from pipelines.text import echo, plural


@command(
    "run",
    "run a configuration, or resume it",
    CONFIG,
    OVERRIDES,
    ITERATIONS,
    argument("--dry-run", action="store_true", help="print what would run, why, and the memory it needs"),
    argument("--force", action="append", default=[], metavar="STAGE", help="run it again: a name, or a pattern with *"),
    argument("--detach", action="store_true", help="submit all stages to Slurm at once and return"),
    argument(
        "--share",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="reuse another run's artifacts with the same key",
    ),
    group="run",
    keys=lambda: "\n\n".join(
        [
            describe(RunConfig),
            f"executor: {describe(ExecutorSection)}",
            f"executor.resources, and each entry of executor.stages: {describe(ResourcesSection)}",
        ]
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
def run_command(options: argparse.Namespace) -> None:
    """`pipeline run CONFIG --iters N [key=value ...]`."""
    console = make_console()
    if options.dry_run:
        dry_run(console, options)
        return
    require_home()
    wanted = plan_run(options.config, options.overrides, options.iters, download=True)
    config, graph = wanted.config, wanted.graph
    run = RunDirectory(config.run_directory)
    site = Site(run, graph, config, ENTRY)
    executors = Executors(site)
    check_entries(graph, config)
    for executor in executors.used():
        executor.check()
    require_possible(graph, wanted.cluster)
    check_environments(graph, config)
    check_hooks(config)
    refuse(preflight(graph, config.environments))
    forced = resolve(graph, options.force)
    for executor in executors.outliving_drivers():
        executor.require_no_detached_run(same_settings=options.detach and not forced)
    echo(console, *(f"warning: {text}" for text in wanted.warnings))
    run.claim(config, find_config(options.config), wanted.iterations, wanted.commits)
    initialize_hooks(config, run.path)
    set_aside(run.path, graph, forced)
    require_space(run.path, "directory")
    shared = SharedArtifacts(run.path, graph, exclude=forced)
    for other in options.share:
        shared.offer(open_run(other)[1])
    if options.detach:
        plan = verdicts(graph, config, [])
        executors.require_detachable(plan)
        executors.of_kind(config.executor.kind).detach(console, plan)
        return
    try:
        with Display(console, run, graph, quiet=options.quiet) as display:
            ran = Driver(site, [display, *listeners_of(run, graph)]).drive()
    except RunStoppedError:
        print_table(console, graph)
        raise
    if options.share:
        echo(console, f"{plural(shared.remove_unused(), 'stage')} reused from {', '.join(map(str, options.share))}")
    echo(console, *report_forced(run.path, graph))
    if ran == 0:
        echo(console, f"{run.path} is finished: all {len(graph.nodes)} stages are published; nothing to do.")
    print_table(console, graph)


def dry_run(console: Console, options: argparse.Namespace) -> None:
    """`pipeline run --dry-run`: print what would run and why, and the memory it needs."""
    require_home()
    wanted = plan_run(options.config, options.overrides, options.iters, download=False)
    config, graph = wanted.config, wanted.graph
    lenders = [open_run(other)[1] for other in options.share]
    check_entries(graph, config)
    require_possible(graph, wanted.cluster)
    check_hooks(config)
    refuse(preflight(graph, config.environments))
    plan = verdicts(graph, config, resolve(graph, options.force))
    echo(console, *(f"warning: {text}" for text in wanted.warnings))
    echo(console, *(f"{'reuse' if it.reuse else 'run':<6} {name}  ({it.reason})" for name, it in plan.items()))
    if (stop := stop_decision(graph, reused(plan))) is not None:
        echo(console, f"stopped: {stop.reason} Nothing of a later iteration is started.")
    for other, lender in zip(options.share, lenders, strict=True):
        found = sum(name in lender.nodes and (lender.nodes[name].output / MANIFEST).is_file() for name in graph.nodes)
        echo(console, f"{other} has published {found} of these stages; the run reuses those with the same key.")
    print_memory(console, graph, config)
    executors = Executors(Site(RunDirectory(config.run_directory), graph, config, ENTRY))
    if options.detach:
        executors.require_detachable(plan)
    for executor in executors.used():
        executor.write_dry_run(console, plan, detached=options.detach)


@command(
    "fork",
    "create a run that shares the iterations before I with another one",
    RUN,
    argument("--from-iteration", type=int, required=True, metavar="I", help="the first that may differ"),
    argument("--name", help="the new run's name; by default RUN-from-I"),
    argument("overrides", nargs="*", metavar="key=value", help="values from iteration I on"),
    group="run",
)
def _fork(options: argparse.Namespace) -> None:
    source = RunDirectory.existing(options.run)
    target, count = fork(source, options.from_iteration, options.overrides, options.name)
    shown = os.path.relpath(target)
    text = f"{shown}: {count} artifacts are shared with {options.run}. Go on with: pipeline run {shown}/config.yaml"
    echo(make_console(), text)


@command(
    "sweep",
    "run a grid of values, sharing common stages, and compare the results",
    CONFIG,
    argument("overrides", nargs="*", metavar="key=value", help="key=[a,b] for the values of the grid; else one value"),
    ITERATIONS,
    argument("--metric", help="as in `pipeline compare`"),
    argument("--json", action="store_true", help="print the comparison as one JSON object"),
    group="run",
)
def _sweep(options: argparse.Namespace) -> int:
    points = grid(options.overrides)
    console = make_console(stderr=options.json)
    for point in points:  # reports all mistakes before the first run
        base = load_run_config(options.config, point.overrides)
    folder = base.directory / f"{base.name}-sweep"
    done: list[Path] = []
    worst = 0
    for number, point in enumerate(points):
        echo(console, f"run {number + 1} of {len(points)}: {folder / point.name}")
        overrides = [item for item in point.overrides if item.partition("=")[0] not in LOCATION_KEYS]
        command = [sys.executable, "-m", "pipelines", "run", options.config, *overrides]
        command += [f"directory={folder}", f"name={point.name}", *(f"--share={run}" for run in done)]
        command += [] if options.iters is None else [f"--iters={options.iters}"]
        command += [f"--{name}" for name in ("plain", "quiet") if getattr(options, name)]
        code = subprocess.run(command, check=False, stdout=sys.stderr if options.json else None).returncode
        if code in (UserError.exit_code, INTERRUPTED):
            return code  # the other runs would fail in the same way, or were interrupted
        worst = code or worst
        if code in (0, RunStoppedError.exit_code):
            done.append(folder / point.name)
    if len(done) > 1:
        found = compare([open_run(run) for run in done])
        print(as_json(found)) if options.json else print_comparison(console, found, options.metric)
        worst = worst or bool(found.left_out)
    return worst


@command("attach", "watch a detached run, from any node", RUN, group="run")
def _attach(options: argparse.Namespace) -> None:
    attach(make_console(), *open_run(options.run))


@command("cancel", "stop a run, on any machine; what is finished stays", RUN, group="run")
def _cancel(options: argparse.Namespace) -> None:
    cancel(make_console(), *open_run(options.run))
