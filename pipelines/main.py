"""The `pipeline` command."""

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from contracts.config import Parser, describe, validate
from contracts.errors import UserError, as_user_error
from contracts.preflight import refuse
from contracts.stage import require_space
from contracts.surroundings import INTERRUPTED, PIPE_GONE, output_is_closed
from pipelines.config.executor import ExecutorSection, ResourcesSection
from pipelines.config.load import load_run_config
from pipelines.config.recipes import describe_recipes, find_config
from pipelines.config.run import RunConfig
from pipelines.config.sections import RetentionSection
from pipelines.doctor.command import doctor
from pipelines.environments.launch import become
from pipelines.environments.locked import NAMES, STAGES, InstallError, describe_all, interpreter, sync
from pipelines.environments.paths import require_home
from pipelines.execution.attempts import StageFailedError
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Executors, Site
from pipelines.graph import Graph
from pipelines.hub.command import add_push
from pipelines.insight.compare.command import as_json, print_comparison
from pipelines.insight.compare.gather import compare
from pipelines.insight.display import Display, Screen
from pipelines.insight.hooks.task import begin_hooks, check_hooks
from pipelines.insight.listeners import listeners_of
from pipelines.insight.report.command import report
from pipelines.insight.report.view import PORT, view
from pipelines.insight.status import jobs_elsewhere, print_status
from pipelines.insight.tables import print_table
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
from pipelines.run.sharing import Shared
from pipelines.run.sweep import grid
from pipelines.run.verdicts import verdicts
from pipelines.text import plural, say


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done; 2: a mistake of the user's, in one message; 1: anything else; 130: interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = parse(arguments)
        return int(options.command(options) or 0)
    except (InstallError, StageFailedError) as error:
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
    options, rest = PARSER.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        PARSER.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


PARSER = Parser(prog="pipeline", description="Iterative online RLHF.")
COMMANDS = PARSER.add_subparsers(required=True, metavar="COMMAND")


def argument(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An argument of a command, as argparse takes it."""
    return names, settings


def command(
    name: str,
    help: str,
    *arguments: tuple[tuple[str, ...], dict[str, Any]],
    of: Any = COMMANDS,
    keys: Callable[[], str] | None = None,
    **settings: Any,
) -> Any:
    """Declare the function below as a command. It returns the exit code; None is 0.

    Args:
        of: where it belongs, if it is a part of another command.
        keys: the configuration's keys, for the end of its help.
    """
    child = of.add_parser(name, help=help, **settings)
    child.keys = keys
    for names, options in arguments:
        child.add_argument(*names, **options)

    def declare(perform: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
        child.set_defaults(command=perform)
        return perform

    return declare


CONFIG = argument("config", help="the run's YAML file, or the name of a recipe (pipeline recipes)")
OVERRIDES = argument("overrides", nargs="*", metavar="key=value", help="keys to set, like generation.k=8")
ITERATIONS = argument("--iters", type=int, default=None, help="iterations to have in the end")
RUN = argument("run", type=Path, help="the run's directory, for example runs/quickstart")


@command(
    "run",
    "run a configuration, or continue it",
    CONFIG,
    OVERRIDES,
    ITERATIONS,
    argument("--dry-run", action="store_true", help="say what would run, and why, and the memory it takes"),
    argument(
        "--force", action="append", default=[], metavar="STAGE", help="make it again: a name, or a pattern with *"
    ),
    argument("--detach", action="store_true", help="submit all stages to Slurm at once and return"),
    argument(
        "--share",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="take over from another run what comes out the same, instead of making it again",
    ),
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
    check_patterns(graph, config.executor)
    for executor in executors.used():
        executor.check()
    check_inputs(graph)
    check_environments(graph, config)
    check_hooks(config)
    refuse(preflight(graph, config.environments))
    forced = resolve(graph, options.force)
    for executor in executors.lasting():
        executor.require_no_detached_run(same_settings=options.detach and not forced)
    run.claim(config, find_config(options.config), wanted.iterations)
    begin_hooks(config, run.path)
    set_aside(run.path, graph, forced)
    require_space(run.path, "directory")
    shared = Shared(run.path, graph, but=forced)
    for other in options.share:
        shared.offer(opened(other)[1])
    if options.detach:
        plan = verdicts(graph, config, [])
        executors.require_detachable(plan)
        executors.named(config.executor.kind).detach(console, plan)
        return
    with Display(console, run, len(graph.nodes)) as display:
        ran = Driver(site, [display, *listeners_of(run, graph)]).drive()
    if options.share:
        say(console, f"{plural(shared.withdraw(), 'stage')} taken over from {', '.join(map(str, options.share))}")
    say(console, *report_forced(run.path, graph))
    if ran == 0:
        say(console, f"{run.path} is finished: all {len(graph.nodes)} stages are published; nothing to do.")
    print_table(console, graph)


def dry_run(console: Console, options: argparse.Namespace) -> None:
    """`pipeline run --dry-run`: what would run, and why, and what it takes."""
    wanted = plan_run(options.config, options.overrides, options.iters, download=False)
    config, graph = wanted.config, wanted.graph
    check_patterns(graph, config.executor)
    check_inputs(graph)
    check_hooks(config)
    refuse(preflight(graph, config.environments))
    plan = verdicts(graph, config, resolve(graph, options.force))
    say(console, *(f"{'reuse' if it.reuse else 'run':<6} {name}  ({it.reason})" for name, it in plan.items()))
    print_memory(console, graph, config)
    executors = Executors(Site(RunDirectory(config.run_directory), graph, config, ENTRY))
    if options.detach:
        executors.require_detachable(plan)
    for executor in executors.used():
        executor.write_dry_run(console, plan, detached=options.detach)


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    console = Screen()
    return console if console.is_terminal else Screen(width=200)


@command(
    "fork",
    "a new run that shares the iterations before I with another one",
    RUN,
    argument("--from-iteration", type=int, required=True, metavar="I", help="the first that may differ"),
    argument("--name", help="the new run's name; by default RUN-from-I"),
    argument("overrides", nargs="*", metavar="key=value", help="values from iteration I on"),
)
def _fork(options: argparse.Namespace) -> None:
    source = RunDirectory.existing(options.run)
    target, count = fork(source, options.from_iteration, options.overrides, options.name)
    shown = os.path.relpath(target)
    text = f"{shown}: {count} artifacts are shared with {options.run}. Go on with: pipeline run {shown}/config.yaml"
    say(make_console(), text)


def opened(path: Path) -> tuple[RunDirectory, Graph]:
    """An existing run, and the stages that its last command asked for."""
    run = RunDirectory.existing(path)
    return run, build_graph(run.config, run.iterations)


@command("status", "how far a run is", RUN)
def _status(options: argparse.Namespace) -> None:
    print_status(make_console(), *opened(options.run))


@command("attach", "watch a run that goes on by itself, from any node", RUN)
def _attach(options: argparse.Namespace) -> None:
    attach(make_console(), *opened(options.run))


@command(
    "logs",
    "the last lines of the logs of a stage, or of those that run or failed",
    RUN,
    argument("stage", nargs="?", help="a stage's name, for example iteration-001/training"),
    argument("--lines", type=int, default=30, help="how many of each log"),
)
def _logs(options: argparse.Namespace) -> None:
    print_logs(make_console(), *opened(options.run), options.stage, options.lines)


@command("cancel", "end what works on a run, on whatever machine; what is finished stays", RUN)
def _cancel(options: argparse.Namespace) -> None:
    cancel(make_console(), *opened(options.run))


@command(
    "report",
    "what a run has done, as one page to read and to pass on",
    RUN,
    argument("--output", type=Path, metavar="PAGE", help="where to write the page; by default RUN/report.html"),
    argument("--markdown", action="store_true", help="print it as Markdown instead"),
    argument("--json", action="store_true", help="print what it says as one JSON object instead"),
)
def _report(options: argparse.Namespace) -> None:
    report(*opened(options.run), options.output, as_markdown=options.markdown, as_json=options.json)


@command(
    "view",
    "the report in a browser, anew whenever something happens in the run",
    RUN,
    argument("--port", type=int, help=f"of this machine; by default {PORT}, or any that is free"),
)
def _view(options: argparse.Namespace) -> None:
    view(make_console(), partial(opened, options.run), options.port)


@command(
    "compare",
    "what differs between runs, and which policy is better by how much on the same held-out prompts",
    argument("runs", nargs="+", type=Path, help="the runs' directories; each is compared with the first"),
    argument("--metric", help="shown by iteration: a name of eval/; by default the gold reward, or the reward"),
    argument("--iteration", type=int, metavar="I", help="whose policies are compared; by default each run's last"),
    argument("--json", action="store_true", help="print everything as one JSON object"),
)
def _compare(options: argparse.Namespace) -> None:
    found = compare([opened(run) for run in options.runs], options.iteration)
    if options.json:
        print(as_json(found))
    else:
        print_comparison(make_console(), found, options.metric)


@command(
    "sweep",
    "run a grid of values, share what comes out the same, and compare the results",
    CONFIG,
    argument("overrides", nargs="*", metavar="key=value", help="key=[a,b] for the values of the grid; else one value"),
    ITERATIONS,
    argument("--metric", help="as in `pipeline compare`"),
    argument("--json", action="store_true", help="print the comparison as one JSON object"),
)
def _sweep(options: argparse.Namespace) -> int:
    points = grid(options.overrides)
    console = Console(file=sys.stderr, highlight=False) if options.json else make_console()
    base = load_run_config(options.config, [])
    folder = base.directory / f"{base.name}-sweep"
    done: list[Path] = []
    worst = 0
    for number, point in enumerate(points):
        say(console, f"run {number + 1} of {len(points)}: {folder / point.name}")
        command = [
            sys.executable,
            "-m",
            "pipelines",
            "run",
            options.config,
            f"directory={folder}",
            f"name={point.name}",
        ]
        command += [*point.overrides, *(f"--share={run}" for run in done)]
        command += [] if options.iters is None else [f"--iters={options.iters}"]
        code = subprocess.run(command, check=False, stdout=sys.stderr if options.json else None).returncode
        if code in (UserError.exit_code, INTERRUPTED):
            return code  # it would be the same with the others, or is not wanted
        if code:
            worst = code
        else:
            done.append(folder / point.name)
    if len(done) > 1:
        found = compare([opened(run) for run in done])
        print(as_json(found)) if options.json else print_comparison(console, found, options.metric)
    return worst


@command(
    "gc",
    "delete and compress what a run does not need, and say why the rest stays",
    RUN,
    argument("--keep", metavar="POLICY", help='whose weights stay: all, best or "last N"; else as the run says'),
    argument("--compress", action="store_true", help="keep the rows of finished iterations compressed"),
    argument("--superseded", action="store_true", help="delete what other keys had published"),
    argument("--dry-run", action="store_true", help="say what would be done; change nothing"),
)
def _gc(options: argparse.Namespace) -> None:
    run, graph = opened(options.run)
    retention = run.config.retention
    keep = retention.keep if options.keep is None else options.keep
    compress = options.compress or retention.compress
    section = validate(RetentionSection, {"keep": keep, "compress": compress}, "pipeline gc")
    busy = partial(jobs_elsewhere, run, graph)
    collect(make_console(), run, section, busy, superseded=options.superseded, dry_run=options.dry_run)


@command(
    "pin",
    "keep everything of a run, whatever gc or its retention say",
    RUN,
    argument("--off", action="store_true", help="no longer"),
)
def _pin(options: argparse.Namespace) -> None:
    run = RunDirectory.existing(options.run)
    run.pin(off=options.off)
    state = "no longer pinned" if options.off else "pinned: nothing of it is deleted or compressed"
    say(make_console(), f"{options.run} is {state}.")


@command(
    "trace",
    "where a checkpoint, a pair or a prompt comes from",
    argument("what", metavar="CHECKPOINT|PAIR_ID|PROMPT_ID", help="a path in a run, an id, or a digest"),
    argument("--run", type=Path, help="the run to look in; by default all below ./runs"),
    argument("--json", action="store_true", help="print one JSON object"),
)
def _trace(options: argparse.Namespace) -> None:
    print_trace(make_console(), options.what, options.run, as_json=options.json)


@command(
    "verify",
    "whether everything published is whole and fits together",
    argument("run", type=Path, help="the run's directory, or that of one artifact"),
)
def _verify(options: argparse.Namespace) -> None:
    print_verification(make_console(), options.run)


@command(
    "doctor",
    "what would go wrong in a run, before it starts",
    CONFIG,
    OVERRIDES,
    ITERATIONS,
    argument("--json", action="store_true", help="print the findings as a JSON list"),
)
def _doctor(options: argparse.Namespace) -> int:
    return doctor(Screen(), options.config, options.overrides, options.iters, as_json=options.json)


add_push(COMMANDS)


@command(
    "recipes",
    "the recipes that come with Ratchet, or the text of one",
    argument("name", nargs="?", help="print this one: pipeline recipes smollm2 > mine.yaml"),
)
def _recipes(options: argparse.Namespace) -> None:
    print(describe_recipes() if options.name is None else find_config(options.name).read_text(), end="")


ENVIRONMENTS = COMMANDS.add_parser("env", help="build and list the stages' environments").add_subparsers(
    required=True, metavar="COMMAND"
)
ENVIRONMENT = argument("name", metavar="NAME", help=", ".join(NAMES))
VARIANT = argument("--variant", default="auto", choices=["auto", "cpu", "gpu"], help="auto: gpu if there is one")


@command(
    "sync",
    "build the environments that are missing",
    argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; by default those of stages"),
    VARIANT,
    of=ENVIRONMENTS,
)
def _sync(options: argparse.Namespace) -> None:
    sync(options.names or list(STAGES), options.variant, partial(print, flush=True))


@command("list", "show the environments and where they are", VARIANT, of=ENVIRONMENTS)
def _list(options: argparse.Namespace) -> None:
    print(*describe_all(options.variant), sep="\n")


@command("python", "print the path of an environment's interpreter", ENVIRONMENT, VARIANT, of=ENVIRONMENTS)
def _python(options: argparse.Namespace) -> None:
    print(interpreter(options.name, options.variant))


@command(
    "run",
    "run `python ARGUMENTS` as a stage runs: there, with Ratchet's code",
    ENVIRONMENT,
    argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="-m training --help"),
    VARIANT,
    of=ENVIRONMENTS,
)
def _become(options: argparse.Namespace) -> None:
    become(options.name, options.variant, options.arguments)
