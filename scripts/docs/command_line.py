"""Generates the command line reference from the declarations of the commands."""

import argparse
from collections.abc import Iterator

from pipelines.commands.declaring import EXAMPLES, GROUPS, HELP, PARSER
from pipelines.main import COMMANDS as MODULES

COMMON_OPTIONS = ("help", "plain", "quiet")
"""Options that all commands have."""
BEGIN = """\
# Command line

`pipeline COMMAND --help` says the same. A configuration (`CONFIG`) is a YAML file or the name of a
[recipe](../recipes.md); `key=value` sets one of its [keys](configuration.md), anywhere after it.
Every command has `--plain` (no colours, no boxes, no live updates: for logs) and `--quiet` (only errors, and the
result), except those that pass their arguments on to another program.

"""


def page() -> str:
    """The text of the page."""
    assert MODULES  # their import declares the commands
    lines = [BEGIN + "```text\n" + EXAMPLES.strip() + "\n```\n"]
    parsers = subcommands(PARSER)
    for group, title in GROUPS.items():
        lines.append(f"## {title[0].upper()}{title[1:]}\n")
        for name, (of, _) in HELP.items():
            if of == group:
                lines += command_section(f"pipeline {name}", parsers[name])
    return "\n".join(lines)


def command_section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """The section of a command and of its subcommands."""
    yield f"### {name}\n"
    yield f"{parser.description}\n"
    parts = subcommands(parser)
    if parts:
        for part, child in parts.items():
            yield from command_section(f"{name} {part}", child)
        return
    usage = " ".join(parser.format_usage().removeprefix("usage:").split())
    for option in COMMON_OPTIONS:
        usage = usage.replace(f" [--{option}]", "").replace(" [-h]", "")
    yield f"```text\n{usage}\n```\n"
    rows = [action for action in parser._actions if action.dest not in COMMON_OPTIONS]
    if rows:
        yield "| argument | meaning |\n|---|---|"
        for action in rows:
            yield f"| {notation(action)} | {meaning(action)} |"
        yield ""


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a command."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def notation(action: argparse.Action) -> str:
    """The notation of an argument, as Markdown."""
    value = action.metavar or action.dest.upper()
    if action.option_strings:
        takes = "" if action.nargs == 0 else f" {value}"
        return ", ".join(f"`{name}{takes}`" for name in action.option_strings)
    return f"`{action.metavar or action.dest}`" + (" ..." if action.nargs in ("*", "+", argparse.REMAINDER) else "")


def meaning(action: argparse.Action) -> str:
    """The help text of an argument, with its choices and default."""
    text = str(action.help or "").replace("%%", "%").replace("|", "\\|")
    if action.choices and action.nargs != 0 and not all(f"{choice}" in text for choice in action.choices):
        text += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
    default = action.default
    if action.nargs == 0 or default in (None, argparse.SUPPRESS) or default == [] or f"{default}" in text:
        return text
    return f"{text} (default `{default}`)"
