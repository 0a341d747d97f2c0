"""Commands that prepare a run: doctor, recipes, env, completion."""

import argparse
from functools import partial

import shtab

from pipelines.commands.declaring import (
    COMMANDS,
    CONFIG,
    HELP,
    ITERATIONS,
    OVERRIDES,
    PARSER,
    argument,
    command,
    make_console,
)
from pipelines.config.recipes import describe_recipes, find_config
from pipelines.doctor.command import doctor
from pipelines.environments.launch import exec_python
from pipelines.environments.locked import NAMES, STAGES, describe_all, interpreter, sync


@command(
    "doctor",
    "check a run for problems before it starts",
    CONFIG,
    OVERRIDES,
    ITERATIONS,
    argument("--json", action="store_true", help="print the findings as a JSON list"),
    group="prepare",
)
def _doctor(options: argparse.Namespace) -> int:
    return doctor(make_console(), options.config, options.overrides, options.iters, as_json=options.json)


@command(
    "recipes",
    "list the built-in recipes, or print one",
    argument("name", nargs="?", help="print this one: pipeline recipes smollm2 > mine.yaml"),
    group="prepare",
)
def _recipes(options: argparse.Namespace) -> None:
    print(describe_recipes() if options.name is None else find_config(options.name).read_text(), end="")


ENV_HELP = "build and list the stages' environments"
HELP["env"] = "prepare", ENV_HELP
ENVIRONMENTS = COMMANDS.add_parser("env", help=ENV_HELP, description=f"{ENV_HELP.capitalize()}.").add_subparsers(
    required=True, metavar="COMMAND"
)
ENVIRONMENT = argument("name", metavar="NAME", help=", ".join(NAMES))
VARIANT = argument("--variant", default="auto", choices=["auto", "cpu", "gpu"], help="auto: gpu if there is one")


@command(
    "sync",
    "build missing environments",
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
    "run `python ARGUMENTS` in a stage's environment, with Ratchet's code",
    ENVIRONMENT,
    argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="-m training --help"),
    VARIANT,
    of=ENVIRONMENTS,
)
def _run(options: argparse.Namespace) -> None:
    exec_python(options.name, options.variant, options.arguments)


@command(
    "completion",
    "print a shell completion script",
    argument("shell", choices=shtab.SUPPORTED_SHELLS, help='bash: eval "$(pipeline completion bash)" in ~/.bashrc'),
    group="prepare",
)
def _completion(options: argparse.Namespace) -> None:
    print(shtab.complete(PARSER, options.shell))
