"""Preflight: finds problems that would make a stage fail hours later, in its own environment, before a run starts.

The driver knows all stages of a run, but has neither torch nor a tokenizer. So it sends the stages' configs to each of
their environments, on standard input of `python -m contracts.preflight`, and reads a `PreflightReport` from the last
line of its output. Paths that the run has not published yet are replaced: a model by the one that it is trained from,
anything else by a name that does not exist (`Inspected.made`).

A stage's check (`Stage.preflight`) sees one stage at a time and yields findings. An error stops `pipeline run` before
the first stage; `pipeline doctor` shows all findings.
"""

import contextlib
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from contracts import entrypoint
from contracts.config import variant
from contracts.declaration import load, stages_of
from contracts.errors import TransientError, UserError, as_user_error
from contracts.records import JsonObjects, Message

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One result of a check."""

    level: Level
    found: str
    """The finding in one or two sentences: what was checked, and the result."""
    fix: str | None = None
    """How to fix a warning or an error; None if `found` says it, or nothing needs to be done."""


class Conversation(msgspec.Struct, frozen=True):
    """A conversation from the user's data; together they cover all kinds that the run will render.

    `contracts.conversation_samples` picks them.
    """

    place: str
    """File and line, for messages: "prompts.jsonl, line 3"."""
    use: Literal["prompts", "demonstrations"]
    """Demonstrations end with the answer to imitate; prompts end where the policy has to answer."""
    messages: tuple[Message, ...]
    tools: JsonObjects | None = None


class StageRequest(msgspec.Struct, frozen=True):
    """One stage of the run, or several equal ones, as sent by the driver."""

    name: str
    """Name of the (first) node in the run's graph, for messages."""
    package: str
    command: str
    """The stage's command: "policy", "score", "generation"."""
    config: dict[str, Any]
    made: tuple[str, ...]
    """Input fields whose path the run has yet to publish."""


class PreflightRequest(msgspec.Struct, frozen=True):
    """The request to one environment."""

    stages: tuple[StageRequest, ...]
    conversations: tuple[Conversation, ...] = ()


class PreflightReport(msgspec.Struct):
    """The answer of one environment."""

    findings: list[Finding] = []
    probes: dict[str, Any] = {}
    """Tokenizations of fixed texts and of the conversations, by model path. The driver compares environments."""
    vocabularies: dict[str, str] = {}
    """Digests of vocabularies, by model path. The driver compares models that read each other's token ids."""


@dataclass
class Inspected:
    """One stage, as a check sees it."""

    name: str
    config: Any
    """The stage's config, validated. Its `output` is a placeholder."""
    made: frozenset[str]
    """Input fields whose path the run has yet to publish; a model's field then names the model it is trained from."""
    conversations: tuple[Conversation, ...]
    report: PreflightReport = field(default_factory=PreflightReport)
    """A check adds to its `probes` and `vocabularies`; findings are yielded."""

    def prompts(self) -> list[Conversation]:
        """The conversations that the policy has to answer."""
        return [conversation for conversation in self.conversations if conversation.use == "prompts"]

    def demonstrations(self) -> list[Conversation]:
        """The conversations whose last message is to be imitated."""
        return [conversation for conversation in self.conversations if conversation.use == "demonstrations"]


def findings_of(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Collect the findings of a check; an error that stops it becomes a finding, so that the other checks still run."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        mistake = as_user_error(error) or (error if isinstance(error, TransientError) else None)
        if mistake is not None:
            return [*found, Finding("error", str(mistake))]
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"({place.filename}, line {place.lineno})"
        found.append(Finding("error", f"this check itself failed: {type(error).__name__}: {error} {where}."))
    return found


def examine(request: PreflightRequest) -> PreflightReport:
    """Check all stages of a request; duplicate findings are dropped."""
    report = PreflightReport()
    found: dict[Finding, None] = {}
    for requested in request.stages:
        stage = stages_of(requested.package)[requested.command]
        assert stage.preflight is not None
        check = load(stage.preflight)
        config = variant(stage.config, requested.config, requested.name).model_validate(requested.config)
        inspected = Inspected(requested.name, config, frozenset(requested.made), request.conversations, report)
        found |= dict.fromkeys(findings_of(functools.partial(check, inspected)))
    report.findings = list(found)
    return report


def serve() -> None:
    """Answer the request on standard input; output of libraries goes to stderr."""
    entrypoint.prepare()
    with contextlib.redirect_stdout(sys.stderr):
        report = examine(msgspec.json.decode(sys.stdin.buffer.read(), type=PreflightRequest))
    print(json.dumps(msgspec.to_builtins(report)))


def refuse(findings: list[Finding]) -> None:
    """Raise UserError with all errors among the findings, if there are any."""
    wrong = [finding for finding in findings if finding.level == "error"]
    errors = [f"{finding.found} {finding.fix or ''}".rstrip() for finding in wrong]
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        raise UserError("\n  ".join([f"{len(errors)} things would stop this run:", *errors]))


if __name__ == "__main__":
    serve()
    entrypoint.finish(0)
