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

    def tell(news: "Pushed") -> None:
        found.append(news)
        if not options.json:
            print(line_of(news), flush=True)

    pusher.trouble = lambda failure: print(failure.text, file=sys.stderr, flush=True)
    if options.dry_run:
        for news in pusher.plan(only=options.iteration):
            tell(news)
    else:
        with pusher.alone(wait=False):
            for news in pusher.push(only=options.iteration):
                tell(news)
            if options.iteration is None and run.holder() is None:
                for news in pusher.report():
                    tell(news)
    if options.json:
        print(json.dumps([news.as_data() for news in found], indent=1))
    elif not found:
        what = "nothing" if options.iteration is None else f"no iteration {options.iteration}"
        print(f"{options.run} has {what} to push yet: an iteration is pushed when its policy has been evaluated.")
    failed = [news for news in found if news.state == "failed"]
    return max((UserError.exit_code if news.lasts else FAILED for news in failed), default=0)


def section_of(run: RunDirectory, overrides: list[str]) -> HubSection:
    """The repos that a run is pushed to: its section `hub`, with the overrides of the command line.

    Raises:
        UserError: no repo is given, or an override is not valid.
    """
    if other := [text for text in overrides if not text.startswith("hub.")]:
        raise UserError(f"{other[0]}: only keys of the section `hub` can be set here, such as hub.model=ORG/NAME.")
    section = run.config.hub
    said = {"hub": section.model_dump(exclude_unset=True) if section is not None else {}}
    found = validate(HubSection, apply_overrides(said, overrides)["hub"], "pipeline push").of(run.path.name)
    if not (found.model or found.pairs or found.rollouts):
        raise UserError(
            f"{run.path} has no repo on the Hub to push to. Give hub.model=ORG/NAME (and hub.pairs, "
            "hub.rollouts) here, or in its configuration."
        )
    return found


def line_of(news: "Pushed") -> str:
    """The outcome as one line for a terminal."""
    place = f"{news.what} of the {'model' if news.kind == 'model' else 'data set'} {news.repo}"
    if news.state == "failed":
        return f"FAILED           {place}: {news.error}"
    commit = f"  ({news.commit[:12]})" if news.commit else ""
    return f"{news.state:<16} {place}{commit}"
