"""Commands that decide what of a run stays, and where else it goes: gc, pin, push."""

import argparse
from functools import partial

from contracts.config import validate
from pipelines.commands.declaring import (
    RUN,
    argument,
    command,
    make_console,
    opened,
)
from pipelines.config.sections import RetentionSection
from pipelines.hub.command import push_command
from pipelines.insight.status import jobs_elsewhere
from pipelines.run.directory import RunDirectory
from pipelines.run.gc import collect
from pipelines.text import say


@command(
    "gc",
    "delete and compress what a run does not need, and say why the rest stays",
    RUN,
    argument("--keep", metavar="POLICY", help='whose weights stay: all, best or "last N"; else as the run says'),
    argument("--compress", action="store_true", help="keep the rows of finished iterations compressed"),
    argument("--superseded", action="store_true", help="delete what other keys had published"),
    argument("--dry-run", action="store_true", help="say what would be done; change nothing"),
    group="keep",
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
    group="keep",
)
def _pin(options: argparse.Namespace) -> None:
    run = RunDirectory.existing(options.run)
    run.pin(off=options.off)
    state = "no longer pinned" if options.off else "pinned: nothing of it is deleted or compressed"
    say(make_console(), f"{options.run} is {state}.")


@command(
    "push",
    "push what a run has published to the Hugging Face Hub",
    RUN,
    argument("overrides", nargs="*", metavar="hub.key=value", help="instead of what the run's `hub` says"),
    argument("--iteration", type=int, metavar="N", help="this iteration alone; 0: the initial policy"),
    argument("--dry-run", action="store_true", help="say what would be pushed; change nothing"),
    argument("--json", action="store_true", help="print one JSON list"),
    group="keep",
)
def _push(options: argparse.Namespace) -> int:
    return push_command(options)
