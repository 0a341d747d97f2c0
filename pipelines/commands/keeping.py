"""Commands that keep, delete and publish artifacts: gc, pin, push."""

import argparse
from functools import partial

from contracts.config import validate
from pipelines.commands.declaring import (
    RUN,
    argument,
    command,
    make_console,
    open_run,
)
from pipelines.config.sections import RetentionSection
from pipelines.hub.command import push_command
from pipelines.insight.status import jobs_elsewhere
from pipelines.run.directory import RunDirectory
from pipelines.run.gc import collect
from pipelines.text import echo


@command(
    "gc",
    "delete and compress what a run does not need, and print why the rest stays",
    RUN,
    argument(
        "--keep", metavar="POLICY", help='whose weights stay: all, best or "last N"; by default the setting of the run'
    ),
    argument("--compress", action="store_true", help="compress the rows of finished iterations"),
    argument("--superseded", action="store_true", help="delete artifacts of old keys"),
    argument("--dry-run", action="store_true", help="print what would be done; change nothing"),
    group="keep",
)
def _gc(options: argparse.Namespace) -> None:
    run, graph = open_run(options.run)
    retention = run.config.retention
    keep = retention.keep if options.keep is None else options.keep
    compress = options.compress or retention.compress
    section = validate(RetentionSection, {"keep": keep, "compress": compress}, "pipeline gc")
    busy = partial(jobs_elsewhere, run, graph)
    collect(make_console(), run, section, busy, superseded=options.superseded, dry_run=options.dry_run)


@command(
    "pin",
    "protect a run from gc and retention",
    RUN,
    argument("--off", action="store_true", help="unpin it"),
    group="keep",
)
def _pin(options: argparse.Namespace) -> None:
    run = RunDirectory.existing(options.run)
    run.pin(off=options.off)
    state = "no longer pinned" if options.off else "pinned: nothing of it is deleted or compressed"
    echo(make_console(), f"{options.run} is {state}.")


@command(
    "push",
    "push a run's artifacts to the Hugging Face Hub",
    RUN,
    argument("overrides", nargs="*", metavar="hub.key=value", help="overrides of the run's `hub`"),
    argument("--iteration", type=int, metavar="N", help="only this iteration; 0: the initial policy"),
    argument("--dry-run", action="store_true", help="print what would be pushed; change nothing"),
    argument("--json", action="store_true", help="print one JSON list"),
    group="keep",
)
def _push(options: argparse.Namespace) -> int:
    return push_command(options)
