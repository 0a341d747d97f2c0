"""The `pipeline` command."""

import argparse
import os
import sys
import traceback
from functools import partial
from pathlib import Path

from rich.console import Console

from contracts.config import Parser, describe, validate
from contracts.errors import UserError, as_user_error
from contracts.preflight import refuse
from contracts.stage import require_space
from contracts.surroundings import INTERRUPTED, PIPE_GONE, output_is_closed
from pipelines.config.executor import ExecutorSection, ResourcesSection
from pipelines.config.recipes import describe_recipes, find_config
from pipelines.config.run import RunConfig
from pipelines.config.sections import RetentionSection
from pipelines.doctor.command import add_doctor
from pipelines.environments.launch import env_main
from pipelines.environments.paths import require_home
from pipelines.execution.attempts import StageFailedError
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Executors, Site
from pipelines.graph import Graph
from pipelines.hub.command import add_push
from pipelines.insight.display import Display, Screen
from pipelines.insight.listeners import listeners_of
from pipelines.insight.status import jobs_elsewhere, print_status
from pipelines.insight.tables import print_comparison, print_table
from pipelines.insight.watch import attach, cancel, print_logs
from pipelines.iteration import build_graph
from pipelines.job import ENTRY
from pipelines.lineage.trace import print_trace
from pipelines.lineage.verify import print_verification
from pipelines.planning.entries import check_patterns
from pipelines.planning.inspection import preflight
from pipelines.planning.memory import print_memory
from pipelines.planning.preflight import check_environments, check_inputs
from pipelines.run.directory import RunDirectory
from pipelines.run.force import report_forced, resolve, set_aside
from pipelines.run.fork import fork
from pipelines.run.gc import collect
from pipelines.run.plan import plan_run
from pipelines.run.verdicts import Verdict, verdicts

LINES_AT_ONCE = 1000


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done; 2: a mistake of the user's, in one message; 1: anything else; 130: interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments[:1] == ["env"]:
            return env_main(arguments[1:])
        options = parse(arguments)
        return int(options.command(options))
    except StageFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if output_is_closed():
            return PIPE_GONE
        traceback.print_exc()
        return 1
    except Exception as error:
        mistake = as_user_error(error)
        if mistake is None:
            traceback.print_exc()
            return 1
        print(f"error: {mistake}", file=sys.stderr)
        return UserError.exit_code


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; key=value items may stand before and after options."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="pipeline", description="Iterative online RLHF.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a configuration, or continue it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.keys = describe_run
    run.add_argument("config", help="the run's YAML file, or the name of a recipe (pipeline recipes)")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="keys to set, like generation.k=8")
    run.add_argument("--iters", type=int, default=None, help="iterations to have in the end")
    run.add_argument("--dry-run", action="store_true", help="say what would run, and why, and the memory it takes")
    run.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="make it again: a name, or a pattern with *",
    )
    run.add_argument("--detach", action="store_true", help="submit all stages to Slurm at once and return")
    run.set_defaults(command=run_command)

    child = commands.add_parser("fork", help="a new run that shares the iterations before I with another one")
    child.add_argument("run", type=Path, help="the run's directory")
    child.add_argument("--from-iteration", type=int, required=True, metavar="I", help="the first that may differ")
    child.add_argument("--name", help="the new run's name; by default RUN-from-I")
    child.add_argument("overrides", nargs="*", metavar="key=value", help="values from iteration I on")
    child.set_defaults(command=fork_command)

    status = commands.add_parser("status", help="how far a run is")
    status.add_argument("run", type=Path, help="the run's directory, for example runs/quickstart")
    status.set_defaults(command=status_command)

    attached = commands.add_parser("attach", help="watch a run that goes on by itself, from any node")
    attached.add_argument("run", type=Path, help="the run's directory")
    attached.set_defaults(command=attach_command)

    logs = commands.add_parser("logs", help="the last lines of the logs of a stage, or of those that run or failed")
    logs.add_argument("run", type=Path, help="the run's directory")
    logs.add_argument("stage", nargs="?", help="a stage's name, for example iteration-001/training")
    logs.add_argument("--lines", type=int, default=30, help="how many of each log")
    logs.set_defaults(command=logs_command)

    end = commands.add_parser("cancel", help="end what works on a run, on whatever machine; what is finished stays")
    end.add_argument("run", type=Path, help="the run's directory")
    end.set_defaults(command=cancel_command)

    compare = commands.add_parser("compare", help="one metric of several runs, by iteration")
    compare.add_argument("runs", nargs="+", type=Path, help="the runs' directories")
    compare.add_argument("--metric", help="a name from metrics.jsonl; by default the gold reward, or the reward")
    compare.set_defaults(command=compare_command)

    gc = commands.add_parser("gc", help="delete and compress what a run does not need, and say why the rest stays")
    gc.add_argument("run", type=Path, help="the run's directory")
    gc.add_argument("--keep", metavar="POLICY", help='whose weights stay: all, best or "last N"; else as the run says')
    gc.add_argument("--compress", action="store_true", help="keep the rows of finished iterations compressed")
    gc.add_argument("--superseded", action="store_true", help="delete what other keys had published")
    gc.add_argument("--dry-run", action="store_true", help="say what would be done; change nothing")
    gc.set_defaults(command=gc_command)

    pin = commands.add_parser("pin", help="keep everything of a run, whatever gc or its retention say")
    pin.add_argument("run", type=Path, help="the run's directory")
    pin.add_argument("--off", action="store_true", help="no longer")
    pin.set_defaults(command=pin_command)

    trace = commands.add_parser("trace", help="where a checkpoint, a pair or a prompt comes from")
    trace.add_argument("what", metavar="CHECKPOINT|PAIR_ID|PROMPT_ID", help="a path in a run, an id, or a digest")
    trace.add_argument("--run", type=Path, help="the run to look in; by default all below ./runs")
    trace.add_argument("--json", action="store_true", help="print one JSON object")
    trace.set_defaults(command=trace_command)

    check = commands.add_parser("verify", help="whether everything published is whole and fits together")
    check.add_argument("run", type=Path, help="the run's directory, or that of one artifact")
    check.set_defaults(command=verify_command)

    add_doctor(commands)
    add_push(commands)

    child = commands.add_parser("recipes", help="the recipes that come with Ratchet, or the text of one")
    child.add_argument("name", nargs="?", help="print this one: pipeline recipes smollm2 > mine.yaml")
    child.set_defaults(command=recipes_command)

    # Mounted by `main` before this parser is asked; here for --help.
    commands.add_parser("env", help="build and list the stages' environments")
    return parser


def describe_run() -> str:
    """The keys of a run's configuration."""
    return "\n\n".join(
        [
            describe(RunConfig),
            f"executor: {describe(ExecutorSection)}",
            f"executor.resources, and each entry of executor.stages: {describe(ResourcesSection)}",
        ]
    )


def run_command(options: argparse.Namespace) -> int:
    """`pipeline run CONFIG --iters N [key=value ...]`."""
    console = make_console()
    if options.dry_run:
        return dry_run(console, options)
    require_home()
    wanted = plan_run(options.config, options.overrides, options.iters, download=True)
    config, graph = wanted.config, wanted.graph
    run = RunDirectory(config.run_directory)
    site = Site(run, graph, config, ENTRY)
    executors = Executors(site)
    check_patterns(graph, config.executor)
    for executor in executors.used():
        executor.check()
    check_inputs(graph)
    check_environments(graph, config.environments)
    refuse(preflight(graph, config.environments))
    forced = resolve(graph, options.force)
    for executor in executors.lasting():
        executor.require_no_detached_run(same_settings=options.detach and not forced)
    run.claim(config, find_config(options.config), wanted.iterations)
    set_aside(run.path, graph, forced)
    require_space(run.path, "directory")
    if options.detach:
        plan = verdicts(graph, config, [])
        executors.require_detachable(plan)
        executors.named(config.executor.kind).detach(console, plan)
        return 0
    with Display(console, run, len(graph.nodes)) as display:
        ran = Driver(site, [display, *listeners_of(run, graph)]).drive()
    for line in report_forced(run.path, graph):
        console.print(line, soft_wrap=True, highlight=False)
    if ran == 0:
        console.print(
            f"{config.run_directory} is finished: all {len(graph.nodes)} stages are published; nothing to do."
        )
    print_table(console, graph)
    return 0


def dry_run(console: Console, options: argparse.Namespace) -> int:
    """`pipeline run --dry-run`: what would run, and why, and what it takes."""
    wanted = plan_run(options.config, options.overrides, options.iters, download=False)
    config, graph = wanted.config, wanted.graph
    check_patterns(graph, config.executor)
    check_inputs(graph)
    refuse(preflight(graph, config.environments))
    plan = print_plan(console, graph, config, resolve(graph, options.force))
    print_memory(console, graph, config)
    executors = Executors(Site(RunDirectory(config.run_directory), graph, config, ENTRY))
    if options.detach:
        executors.require_detachable(plan)
    for executor in executors.used():
        executor.write_dry_run(console, plan, detached=options.detach)
    return 0


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    console = Screen()
    return console if console.is_terminal else Screen(width=200)


def print_plan(console: Console, graph: Graph, config: RunConfig, forced: list[str]) -> dict[str, Verdict]:
    """For every stage *reuse* or *run*, and why; returns them."""
    plan = verdicts(graph, config, forced)
    lines = [f"{'reuse' if verdict.reuse else 'run':<6} {name}  ({verdict.reason})" for name, verdict in plan.items()]
    for start in range(0, len(lines), LINES_AT_ONCE):
        text = "\n".join(lines[start : start + LINES_AT_ONCE])
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    return plan


def fork_command(options: argparse.Namespace) -> int:
    """`pipeline fork RUN --from-iteration I [key=value ...]`."""
    source = RunDirectory.existing(options.run)
    target, count = fork(source, options.from_iteration, options.overrides, options.name)
    shown = os.path.relpath(target)
    make_console().print(
        f"{shown}: {count} artifacts are shared with {options.run}. Go on with: pipeline run {shown}/config.yaml",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def gc_command(options: argparse.Namespace) -> int:
    """`pipeline gc RUN`."""
    run = RunDirectory.existing(options.run)
    retention = run.config.retention
    keep = retention.keep if options.keep is None else options.keep
    compress = options.compress or retention.compress
    section = validate(RetentionSection, {"keep": keep, "compress": compress}, "pipeline gc")
    graph = build_graph(run.config, run.iterations)
    busy = partial(jobs_elsewhere, run, graph)
    collect(make_console(), run, section, busy, superseded=options.superseded, dry_run=options.dry_run)
    return 0


def pin_command(options: argparse.Namespace) -> int:
    """`pipeline pin RUN`."""
    run = RunDirectory.existing(options.run)
    if options.off:
        run.unpin()
    else:
        run.pin()
    state = "no longer pinned" if options.off else "pinned: nothing of it is deleted or compressed"
    make_console().print(f"{options.run} is {state}.", soft_wrap=True, highlight=False)
    return 0


def compare_command(options: argparse.Namespace) -> int:
    """`pipeline compare RUN ...`."""
    print_comparison(make_console(), options.runs, options.metric)
    return 0


def trace_command(options: argparse.Namespace) -> int:
    """`pipeline trace WHAT`."""
    print_trace(make_console(), options.what, options.run, as_json=options.json)
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """`pipeline verify RUN`."""
    print_verification(make_console(), options.run)
    return 0


def recipes_command(options: argparse.Namespace) -> int:
    """`pipeline recipes [NAME]`."""
    print(describe_recipes() if options.name is None else find_config(options.name).read_text(), end="")
    return 0


def opened(path: Path) -> tuple[RunDirectory, Graph]:
    """An existing run, and the stages that its last command asked for."""
    run = RunDirectory.existing(path)
    return run, build_graph(run.config, run.iterations)


def attach_command(options: argparse.Namespace) -> int:
    """`pipeline attach RUN`."""
    attach(make_console(), *opened(options.run))
    return 0


def logs_command(options: argparse.Namespace) -> int:
    """`pipeline logs RUN [STAGE]`."""
    print_logs(make_console(), *opened(options.run), options.stage, options.lines)
    return 0


def cancel_command(options: argparse.Namespace) -> int:
    """`pipeline cancel RUN`."""
    cancel(make_console(), *opened(options.run))
    return 0


def status_command(options: argparse.Namespace) -> int:
    """`pipeline status RUN`."""
    print_status(make_console(), *opened(options.run))
    return 0
