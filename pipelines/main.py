"""Runs the `pipeline` command and turns errors into messages and exit codes."""

import argparse
import sys
import traceback

from contracts.entrypoint import INTERRUPTED, PIPE_GONE, output_is_closed, print_error
from contracts.errors import RunStoppedError, UserError, as_user_error
from pipelines.commands import keeping, pairing, planning, preparing, profiling, reading, running, scoring, weights
from pipelines.commands.declaring import PARSER, STYLE
from pipelines.environments.locked import InstallError
from pipelines.execution.attempts import StageFailedError
from pipelines.lineage.verify import DamageError

COMMANDS = (running, reading, pairing, scoring, keeping, weights, preparing, planning, profiling)
"""Modules that declare the subcommands, in the order of the help."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Exit codes: 0 done; 2 a user's mistake, in one message; 3 a gate has stopped the run; 130
    interrupted; 1 anything else."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = parse(arguments)
        STYLE.plain, STYLE.quiet = getattr(options, "plain", False), getattr(options, "quiet", False)
        return int(options.command(options) or 0)
    except (InstallError, StageFailedError, DamageError) as error:
        print_error(f"error: {error}")
        return error.exit_code
    except RunStoppedError as stop:
        print_error(f"stopped: {stop}")
        return stop.exit_code
    except KeyboardInterrupt:
        print_error("interrupted; the same command continues.")
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
        print_error(f"error: {mistake}")
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
