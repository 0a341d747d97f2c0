"""Declares the commands of `pipeline`, with shared arguments and the console."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from contracts.config import Parser
from contracts.errors import did_you_mean
from pipelines.graph import Graph
from pipelines.iteration import build_graph
from pipelines.run.directory import RunDirectory
from pipelines.text import fits_width, stacked_table

EXAMPLES = """\
examples:
  pipeline run quickstart --iters 2                 run a recipe; the same command resumes it
  pipeline run mine.yaml --dry-run seed=2           what would run, and why
  pipeline status runs/quickstart                   progress; `pipeline runs` lists all
  pipeline logs runs/quickstart --follow            output of its stages
  pipeline report runs/quickstart                   a page with curves and all samples
  pipeline compare runs/a runs/b                    which run is better, and by how much

exit codes:
  0 done    1 a stage or a check failed    2 a user's mistake, in one message    3 stopped by a gate
  130 interrupted
"""
GROUPS = {
    "run": "run and resume",
    "read": "inspect runs",
    "keep": "keep and publish",
    "prepare": "before a run",
}


class CommandLine(Parser):
    """The parser of `pipeline`, whose help lists the commands in groups."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Like argparse's check, but suggest the closest names instead of listing all."""
        if action.choices is not None and value not in action.choices:
            known = sorted(map(str, action.choices))
            hint = did_you_mean(str(value), known, 2) or f" Known: {', '.join(known)}."
            raise argparse.ArgumentError(action, f"there is no {str(value)!r}.{hint} See `{self.prog} --help`.")

    def format_help(self) -> str:
        """The help text."""
        if self is not PARSER:
            return super().format_help()
        lines = ["usage: pipeline COMMAND [ARGUMENTS]", "", f"{self.description}", ""]
        for group, title in GROUPS.items():
            lines.append(f"{title}:")
            lines += [f"  {name:<12}{text}" for name, (of, text) in HELP.items() if of == group]
            lines.append("")
        lines += ["For details: `pipeline COMMAND --help`.", "", EXAMPLES]
        return "\n".join(lines)


HELP: dict[str, tuple[str, str]] = {}
"""Group and one-line help of each command."""
PARSER = CommandLine(prog="pipeline", description="Iterative online RLHF: sample, score, train, and repeat.")
COMMANDS = PARSER.add_subparsers(required=True, metavar="COMMAND")


@dataclass
class Style:
    """Output settings of a command."""

    plain: bool = False
    """No colours, no boxes, no live updates."""
    quiet: bool = False
    """Only errors and the result."""


STYLE = Style()
"""The settings of this process."""


def count(text: str) -> int:
    """Parse a command-line argument that must be a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def argument(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """An argument of a command, for `add_argument`."""
    return names, settings


def command(
    name: str,
    help: str,
    *arguments: tuple[tuple[str, ...], dict[str, Any]],
    group: str = "",
    of: Any = COMMANDS,
    keys: Callable[[], str] | None = None,
    **settings: Any,
) -> Any:
    """Declare the decorated function as a command. It returns the exit code; None is 0.

    Args:
        group: one of GROUPS.
        of: the parent command's subparsers, for a subcommand.
        keys: returns the configuration's keys, which its help appends.
    """
    child = of.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **settings)
    child.keys = keys
    if group:
        HELP[name] = group, help
    for names, options in arguments:
        child.add_argument(*names, **options)
    if not any(options.get("nargs") == argparse.REMAINDER for _, options in arguments):
        child.add_argument("--plain", action="store_true", help="no colours, no boxes, no live updates: for logs")
        child.add_argument("--quiet", action="store_true", help="only errors, and the result")

    def declare(perform: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
        child.set_defaults(command=perform)
        return perform

    return declare


CONFIG = argument("config", help="the run's YAML file, or the name of a recipe (pipeline recipes)")
OVERRIDES = argument("overrides", nargs="*", metavar="key=value", help="keys to set, like generation.k=8")
ITERATIONS = argument("--iters", type=int, default=None, help="total number of iterations")
RUN = argument("run", type=Path, help="the run's directory, for example runs/quickstart")
JSON = argument("--json", action="store_true", help="print one JSON object")


class Screen(Console):
    """Standard output. A closed pipe raises BrokenPipeError, which `main` handles like any other failure."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, with ASCII tables in plain style, and stacked rows where a table does not fit."""
        super().print(*map(self._fitted, objects), **options)

    def _fitted(self, shown: Any) -> Any:
        if not isinstance(shown, Table):
            return shown
        if STYLE.plain and shown.box is not None:
            shown.box = box.ASCII
        return shown if fits_width(self, shown) else stacked_table(self, shown)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, where rich would exit with an exit code of its own."""
        raise BrokenPipeError


def make_console(**options: Any) -> Screen:
    """A console for standard output, wide enough for tables if that is not a terminal."""
    if STYLE.plain:
        options |= {"no_color": True, "force_terminal": False}
    console = Screen(**options)
    return console if console.is_terminal else Screen(width=200, **options)


def open_run(path: Path) -> tuple[RunDirectory, Graph]:
    """Open an existing run, with the graph of stages that its last command asked for."""
    run = RunDirectory.existing(path)
    return run, build_graph(run.config, run.iterations)
