"""The command `profile`: shows how long stages take, and measures it."""

import argparse
import shutil
from pathlib import Path

import msgspec

from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.preflight import refuse
from pipelines.commands.declaring import JSON, OVERRIDES, argument, command, count, make_console
from pipelines.config.recipes import find_config
from pipelines.environments.paths import home, require_home
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Executors, Site
from pipelines.execution.profiling import predictor_for, profiles_of
from pipelines.insight.display import Display
from pipelines.insight.profiles import (
    PROMPTS,
    STEPS,
    as_json,
    predict_stages,
    print_predictions,
    print_profiles,
    short_overrides,
    with_dependencies,
)
from pipelines.job import ENTRY
from pipelines.planning.entries import check_entries
from pipelines.planning.inspection import preflight
from pipelines.planning.preflight import check_environments, require_possible
from pipelines.planning.profiles.rows import Profile
from pipelines.planning.profiles.store import FOLDER, OFF, ProfileStore
from pipelines.run.directory import RunDirectory
from pipelines.run.plan import plan_run
from pipelines.text import echo, plural

LIST = "list"


@command(
    "profile",
    "measure stages without a profile in short runs; `profile list [RUN ...]` shows what runs took",
    argument("source", metavar="CONFIG|list", help="the run's YAML file, the name of a recipe, or `list`"),
    OVERRIDES,
    argument("--list", action="store_true", help="only show what is known, and what a short run would take"),
    argument("--prompts", type=count, default=PROMPTS, help=f"prompts of a short run; {PROMPTS} by default"),
    argument("--steps", type=count, default=STEPS, help=f"optimizer steps of its trainings; {STEPS} by default"),
    argument("--all", action="store_true", help="also run stages known only in another size or layout"),
    JSON,
    group="prepare",
)
def _profile(options: argparse.Namespace) -> None:
    if options.source == LIST:
        _list(options)
        return
    wanted = plan_run(options.source, options.overrides, 1, download=not options.list)
    shortened = short_overrides(wanted.config, options.prompts, options.steps)
    place = [f"directory={home() / 'profiling'}", f"name=short-{digest([options.source, shortened])[:12]}"]
    overrides = [*options.overrides, *shortened]
    brief = plan_run(options.source, [*overrides, *place], 1, download=not options.list)
    known = predict_stages(wanted.graph, brief.graph, predictor_for(wanted.config))
    holes = [name for group in known if group.is_hole or (options.all and group.basis == "scaled")
             for name in group.stages]  # fmt: skip
    console = make_console(stderr=options.json)
    if options.list or not holes:
        if options.json:
            print(as_json(known, overrides))
        else:
            print_predictions(console, known)
            if holes:
                graph = with_dependencies(brief.graph, holes)
                echo(console, f"A short run of {plural(len(graph.nodes), 'stage')} shows it: pipeline profile "
                    f"{options.source}, which is a run with {' '.join(overrides)}.")  # fmt: skip
        return
    if not ProfileStore().is_kept:
        raise UserError(f"{FOLDER}={OFF}: no profiles are kept. Unset it, or name a folder.")
    require_home()
    graph = with_dependencies(brief.graph, holes)
    config = brief.config
    run = RunDirectory(config.run_directory)
    site = Site(run, graph, config, ENTRY)
    check_entries(brief.graph, config)
    for executor in Executors(site).used():
        executor.check()
    require_possible(graph, brief.cluster)
    check_environments(graph, config)
    refuse(preflight(graph, config.environments))
    run.claim(config, find_config(options.source), brief.iterations, brief.commits)
    with Display(console, run, graph, quiet=options.quiet) as display:
        Driver(site, [display]).drive()
    rows = profiles_of(run)
    ProfileStore().append(rows)
    shutil.rmtree(run.path)
    now = predict_stages(wanted.graph, brief.graph, predictor_for(wanted.config))
    if options.json:
        print(as_json(now, overrides))
    else:
        print_profiles(console, rows)
        print_predictions(console, now)


def _list(options: argparse.Namespace) -> None:
    """Print the profiles in the store, or those of the given runs."""
    runs = [RunDirectory.existing(Path(path)) for path in options.overrides]
    rows: list[Profile] = [row for run in runs for row in profiles_of(run)] if runs else ProfileStore().read()
    if options.json:
        print(msgspec.json.encode({"profiles": rows}).decode())
    elif rows:
        print_profiles(make_console(), rows)
    else:
        raise UserError(
            f"there are no profiles in {ProfileStore().folder} yet. Every stage that a run publishes adds one; "
            "`pipeline profile list RUN` reads those of a run."
        )
