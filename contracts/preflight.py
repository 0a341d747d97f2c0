"""Preflight: what a stage would refuse hours later, found in its own environment before anything runs.

The driver knows all stages of a run, but neither torch nor a tokenizer. So it sends the stages' configs to each
environment that they run in, on standard input of `python -m contracts.preflight`, and reads a `Report` from the last
line of its output. Paths that stages of the run have still to make are replaced: a model by the one that it is trained
from, anything else by a name that does not exist (`Inspected.made`).

A stage's check (`Stage.preflight`) looks at one stage at a time and yields findings. An error stops `pipeline run`
before the first stage; `pipeline doctor` shows all of them.
"""

import contextlib
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from contracts import surroundings
from contracts.declaration import load, stages_of
from contracts.errors import TransientError, UserError, as_user_error
from contracts.records import JsonObjects, Message

Level = Literal["ok", "warning", "error"]
F = TypeVar("F")


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    level: Level
    found: str
    """What it is about, and what was found: one sentence or two."""
    fix: str | None = None
    """What to do about a warning or an error; None where `found` says it, or nothing has to be done."""


class Conversation(msgspec.Struct, frozen=True):
    """A conversation of the user's own, of the kinds that the run will render: see `contracts.sampling`."""

    place: str
    """Where it stands, for messages: "prompts.jsonl, line 3"."""
    use: Literal["prompts", "demonstrations"]
    """Demonstrations end with the answer to imitate; prompts end where the policy has to answer."""
    messages: tuple[Message, ...]
    tools: JsonObjects | None = None


class StageRequest(msgspec.Struct, frozen=True):
    """One stage, or several that are alike, as the driver sends it."""

    name: str
    """Name of the (first) stage in the run, for messages."""
    package: str
    command: str
    """What it is called there: "policy", "score", "generation"."""
    config: dict[str, Any]
    made: tuple[str, ...]
    """Input fields whose path a stage of the run will make."""


class PreflightRequest(msgspec.Struct, frozen=True):
    """What one environment is asked."""

    stages: tuple[StageRequest, ...]
    conversations: tuple[Conversation, ...] = ()


class PreflightReport(msgspec.Struct):
    """What it answers."""

    findings: list[Finding] = []
    probes: dict[str, Any] = {}
    """By a model's path, what this environment makes of fixed texts and of the conversations. The driver compares what
    the environments say."""
    vocabularies: dict[str, str] = {}
    """By a model's path, the digest of what each token id stands for. The driver compares models that read each
    other's ids."""


@dataclass
class Inspected:
    """One stage, as a check sees it."""

    name: str
    config: Any
    """The stage's own config, validated. Its `output` means nothing."""
    made: frozenset[str]
    """Input fields whose path a stage of the run will make: of such a model only what it is trained from is known."""
    conversations: tuple[Conversation, ...]
    report: PreflightReport = field(default_factory=PreflightReport)
    """Whose `probes` and `vocabularies` a check adds to; its findings it yields."""

    def prompts(self) -> list[Conversation]:
        """The conversations that the policy has to answer."""
        return [conversation for conversation in self.conversations if conversation.use == "prompts"]

    def demonstrations(self) -> list[Conversation]:
        """The conversations whose last message is to be imitated."""
        return [conversation for conversation in self.conversations if conversation.use == "demonstrations"]


def heard(check: Callable[[], Iterator[F]]) -> tuple[list[F], str | None]:
    """What a check yields, and what stopped it, if anything did, so that the other checks are heard."""
    found: list[F] = []
    try:
        found.extend(check())
    except Exception as error:
        mistake = as_user_error(error) or (error if isinstance(error, TransientError) else None)
        if mistake is not None:
            return found, str(mistake)
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            found,
            f"this check failed itself: {type(error).__name__}: {error} ({place.filename}, line {place.lineno}).",
        )
    return found, None


def findings_of(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check yields, what stops it included."""
    found, stopped = heard(check)
    return found if stopped is None else [*found, Finding("error", stopped)]


def examine(request: PreflightRequest) -> PreflightReport:
    """Check all stages of a request; equal findings are told once."""
    report = PreflightReport()
    found: dict[Finding, None] = {}
    for asked in request.stages:
        stage = stages_of(asked.package)[asked.command]
        assert stage.preflight is not None
        check = load(stage.preflight)
        config = stage.config.model_validate(asked.config)
        inspected = Inspected(asked.name, config, frozenset(asked.made), request.conversations, report)
        found |= dict.fromkeys(findings_of(functools.partial(check, inspected)))
    report.findings = list(found)
    return report


def serve() -> None:
    """Answer the request on standard input; what libraries print is no part of the answer."""
    surroundings.settle()
    with contextlib.redirect_stdout(sys.stderr):
        report = examine(msgspec.json.decode(sys.stdin.buffer.read(), type=PreflightRequest))
    print(json.dumps(msgspec.to_builtins(report)))


def refuse(findings: list[Finding]) -> None:
    """Raise UserError where there are errors, with all of them."""
    wrong = [finding for finding in findings if finding.level == "error"]
    errors = [f"{finding.found} {finding.fix or ''}".rstrip() for finding in wrong]
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        raise UserError("\n  ".join([f"{len(errors)} things would stop this run:", *errors]))


if __name__ == "__main__":
    serve()
