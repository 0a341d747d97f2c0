"""The command `plan`: shows, checks, searches and simulates plans."""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from contracts.errors import UserError
from contracts.files import write_atomically
from pipelines.commands.declaring import (
    COMMANDS,
    HELP,
    ITERATIONS,
    JSON,
    OVERRIDES,
    argument,
    command,
    count,
    make_console,
)
from pipelines.config.cluster import read_machines
from pipelines.config.placement import PlacementSection
from pipelines.config.run import RunConfig
from pipelines.graph import Graph
from pipelines.insight.gantt import picture
from pipelines.insight.plan import as_json, check_plan, events_of, print_plan, view_plan
from pipelines.insight.plan_search import SearchView, fastest, parse_lags, print_search, run_search, search_settings
from pipelines.insight.plan_search import as_json as searches_as_json
from pipelines.insight.plan_simulation import DRAWS, simulate_plan
from pipelines.insight.simulation_view import as_json as simulation_as_json
from pipelines.insight.simulation_view import print_simulation
from pipelines.planning.cluster import cluster_of_machines, configured_cluster
from pipelines.planning.entries import check_entries
from pipelines.planning.placement import placed_graph
from pipelines.planning.search.plan_file import plan_text
from pipelines.run.directory import RunDirectory
from pipelines.run.plan import plan_run, read_run
from pipelines.text import echo

PLAN_HELP = "show, check, search and simulate plans: which stage runs where and when"
HELP["plan"] = "prepare", PLAN_HELP
PLAN = COMMANDS.add_parser("plan", help=PLAN_HELP, description=f"{PLAN_HELP.capitalize()}.").add_subparsers(
    required=True, metavar="COMMAND"
)
SOURCE = argument("source", metavar="CONFIG|RUN", help="a YAML file, the name of a recipe, or a run's directory")
CONFIG = argument("config", help="a YAML file, or the name of a recipe")
CLUSTER = argument("--cluster", type=Path, metavar="FILE", help="a YAML file of machines; without it, this machine")
RUNS = argument(
    "--runs",
    type=Path,
    nargs="+",
    default=[],
    metavar="RUN",
    help="runs to learn from, in addition to the stored profiles",
)


def _planned(options: argparse.Namespace) -> tuple[RunConfig, Graph]:
    path = Path(options.source)
    if path.is_dir():
        run = RunDirectory.existing(path)
        iterations = run.iterations if options.iters is None else options.iters
        return run.config, placed_graph(run.config, iterations, configured_cluster(run.config))
    wanted = plan_run(options.source, options.overrides, options.iters, download=False, cluster=configured_cluster)
    return wanted.config, wanted.graph


@command(
    "show",
    "show each stage's devices and layout, and a timeline of the run",
    SOURCE,
    OVERRIDES,
    ITERATIONS,
    JSON,
    of=PLAN,
)
def _show(options: argparse.Namespace) -> None:
    config, graph = _planned(options)
    check_entries(graph, config)
    view = view_plan(graph, config, configured_cluster(config), events_of(config))
    if options.json:
        print(as_json(view))
    else:
        print_plan(make_console(), view)


@command("check", "check that a plan fits devices, models and memory", SOURCE, OVERRIDES, ITERATIONS, of=PLAN)
def _check(options: argparse.Namespace) -> None:
    config, graph = _planned(options)
    echo(make_console(), *check_plan(graph, config))


@command(
    "search",
    "find the strategy, pools and layouts with the shortest expected time",
    CONFIG,
    OVERRIDES,
    ITERATIONS,
    CLUSTER,
    argument("--output", type=Path, metavar="FILE", help="write the plan there: FILE.yaml, for placement=FILE.yaml"),
    argument("--seconds", type=float, default=60.0, metavar="S", help="time limit of the search (60)"),
    argument("--seed", type=int, default=0, help="seed of the search, and of the drawn errors"),
    argument("--take", metavar="PLAN", help="write this plan of the table: found, flattening, ..."),
    argument("--lags", metavar="N,N", help="lags to consider; by default the config's: a lag changes results"),
    RUNS,
    JSON,
    of=PLAN,
)
def _search(options: argparse.Namespace) -> None:
    if options.output is not None and options.output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output is {options.output}; a plan is a YAML file. Call it {options.output}.yaml.")
    _require_folder("--output", options.output)
    if not options.seconds > 0:
        raise UserError(f"--seconds is {options.seconds:g}; it must be more than 0.")
    machines = read_machines(options.cluster) if options.cluster is not None else None
    runs = [RunDirectory.existing(path) for path in options.runs]
    lags = [[]] if options.lags is None else [[f"lag={lag}"] for lag in parse_lags(options.lags)]
    found: list[tuple[SearchView, PlacementSection]] = []
    asked: list[list[str]] = []
    for lag in lags:
        config, iterations, _ = read_run(options.config, [*options.overrides, *lag], options.iters, download=False)
        settings = search_settings(config, iterations, machines, runs)
        each = options.seconds / len(lags) / len(settings)
        asked += [[*options.overrides, *lag]] * len(settings)
        found += [run_search(setting, seed=options.seed, seconds=each, take=options.take) for setting in settings]
    views = [view for view, _ in found]
    taken = fastest(views)
    if options.output is not None:
        text = plan_text(found[taken][1], shlex.join(["pipeline", *sys.argv[1:]]))
        write_atomically(options.output, text.encode())
    if options.json:
        print(searches_as_json(views, taken))
        return
    console = make_console()
    for view in views:
        print_search(console, view)
    if options.lags is not None:
        echo(console, f"Lag {views[taken].lag} is the fastest; a lag changes the results (docs/lag.md).")
    if options.output is None:
        echo(console, "Write it with --output plan.yaml, then:")
    given = [*asked[taken], *([] if options.iters is None else ["--iters", str(options.iters)])]
    given += [f"placement={options.output or 'plan.yaml'}"]
    given += ["--detach"] if views[taken].way == "detached" else []
    echo(console, shlex.join(["pipeline", "run", options.config, *given]))


@command(
    "simulate",
    "estimate time, cost and bottleneck of a run; exit code 1: it is not expected to finish",
    CONFIG,
    OVERRIDES,
    ITERATIONS,
    CLUSTER,
    argument("--draws", type=count, default=DRAWS, metavar="N", help=f"runs to draw for the interval ({DRAWS})"),
    argument("--seed", type=int, default=0, help="seed of the draws"),
    RUNS,
    argument("--svg", type=Path, metavar="FILE", help="write the timeline as a picture"),
    JSON,
    of=PLAN,
)
def _simulate(options: argparse.Namespace) -> int:
    _require_folder("--svg", options.svg)
    machines = read_machines(options.cluster) if options.cluster is not None else None
    wanted = plan_run(
        options.config,
        options.overrides,
        options.iters,
        download=False,
        cluster=configured_cluster if machines is None else partial(cluster_of_machines, section=machines),
    )
    runs = [RunDirectory.existing(path) for path in options.runs]
    view = simulate_plan(wanted, machines, runs, draws=options.draws, seed=options.seed)
    if options.svg is not None:
        options.svg.write_text(picture(view.plan))
    if options.json:
        print(simulation_as_json(view))
    else:
        print_simulation(make_console(), view)
    return 0 if view.finishes else 1


def _require_folder(option: str, file: Path | None) -> None:
    """Raise UserError before a long computation if its result could not be written to the file."""
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"{option} is {file}, but {file.parent} is not a directory. Make it, or choose another.")
