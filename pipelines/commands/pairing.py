"""The command `pairs`: builds other pairs from an iteration's rollouts."""

import argparse
import shlex
import sys
from functools import partial

from annotation.pairing.config import PairsSettings
from contracts.config import describe
from pipelines.commands.declaring import JSON, RUN, STYLE, argument, command, make_console, open_run
from pipelines.insight.pairs import as_json, compare_pairs, print_pairs
from pipelines.run.alternatives import build, pairs_to_compare, select_alternative
from pipelines.text import echo, relative_path


@command(
    "pairs",
    "build other pairs from an iteration's rollouts, and compare them with its own",
    RUN,
    argument("overrides", nargs="*", metavar="key=value", help="keys of `pairs`, like strategy=all; output=DIRECTORY"),
    argument("--iteration", type=int, metavar="I", help="by default the last one with scores"),
    JSON,
    group="read",
    keys=partial(describe, PairsSettings),
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
def _pairs(options: argparse.Namespace) -> int:
    run, graph = open_run(options.run)
    other = select_alternative(run, graph, options.iteration, options.overrides)
    console = make_console(stderr=options.json)
    place = relative_path(other.path)
    if other.is_own:
        echo(console, f"these are the run's own pairs: {place}")
    elif other.is_published:
        echo(console, f"already made: {place}")
    elif code := build(other, run, sys.stderr if options.json or STYLE.quiet else None):
        return code
    found = compare_pairs(options.run.name, other.iteration, pairs_to_compare(other))
    if options.json:
        print(as_json(found))
        return 0
    print_pairs(make_console(), found)
    if other.changes and not other.is_own:
        words = ["fork", str(options.run), "--from-iteration", str(other.iteration), *other.changes]
        echo(console, f"Train on them: pipeline {shlex.join(words)}")
    return 0
