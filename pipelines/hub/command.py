"""`pipeline push RUN [hub.model=ORG/NAME ...]`: pushes published artifacts that are not on the Hub yet."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from contracts.config import apply_overrides, validate
from contracts.errors import UserError
from pipelines.config.sections import HubSection
from pipelines.run.directory import RunDirectory

if TYPE_CHECKING:
    from pipelines.hub.push import Pushed

FAILED = 1


def push_command(options: argparse.Namespace) -> int:
    """Print what is on the Hub now, or would be pushed.

    Returns:
        The exit code: 0; 1 after a failure that a later push may not meet; 2 after one that the user has to fix.
    """
    from pipelines.hub.push import Pusher  # imports huggingface_hub, which takes long and which only this command needs

    run = RunDirectory.existing(options.run)
    pusher = Pusher(run, section_of(run, options.overrides))
    found: list[Pushed] = []

    def report(outcome: "Pushed") -> None:
        found.append(outcome)
        if not options.json:
            print(line_of(outcome), flush=True)

    pusher.on_failure = lambda failure: print(failure.text, file=sys.stderr, flush=True)
    if options.dry_run:
        for outcome in pusher.plan(only=options.iteration):
            report(outcome)
    else:
        with pusher.exclusive(wait=False):
            for outcome in pusher.push(only=options.iteration):
                report(outcome)
            if options.iteration is None and run.holder() is None:
                for outcome in pusher.report():
                    report(outcome)
    if options.json:
        print(json.dumps([outcome.as_data() for outcome in found], indent=1))
    elif not found:
        what = "nothing" if options.iteration is None else f"no iteration {options.iteration}"
        print(f"{options.run} has {what} to push yet: an iteration is pushed when its policy has been evaluated.")
    failed = [outcome for outcome in found if outcome.state == "failed"]
    return max((UserError.exit_code if outcome.lasts else FAILED for outcome in failed), default=0)


def section_of(run: RunDirectory, overrides: list[str]) -> HubSection:
    """The repos that a run is pushed to: its section `hub`, with the overrides of the command line.

    Raises:
        UserError: no repo is given, or an override is not valid.
    """
    if others := [text for text in overrides if not text.startswith("hub.")]:
        raise UserError(f"{others[0]}: only keys of the section `hub` can be set here, such as hub.model=ORG/NAME.")
    section = run.config.hub
    settings = {"hub": section.model_dump(exclude_unset=True) if section is not None else {}}
    found = validate(HubSection, apply_overrides(settings, overrides)["hub"], "pipeline push").of(run.path.name)
    if not (found.model or found.pairs or found.rollouts):
        raise UserError(
            f"{run.path} has no repo on the Hub to push to. Give hub.model=ORG/NAME (and hub.pairs, "
            "hub.rollouts) here, or in its configuration."
        )
    return found


def line_of(outcome: "Pushed") -> str:
    """The outcome as one line for a terminal."""
    place = f"{outcome.what} of the {'model' if outcome.kind == 'model' else 'data set'} {outcome.repo}"
    if outcome.state == "failed":
        return f"FAILED           {place}: {outcome.error}"
    commit = f"  ({outcome.commit[:12]})" if outcome.commit else ""
    return f"{outcome.state:<16} {place}{commit}"
