"""`python -m contracts.conversation_samples`: picks a few conversations of each kind that occurs in the user's data.

Preflight renders them with every model that will read the data. All rows of a source are read, up to `ROWS`, so that a
role, a tool or a kind of turn that occurs once in a thousand rows is found before the run instead of during it. In data
with more than `KINDS` kinds, the rarest may be missed.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from contracts.demonstrations import read_demonstrations
from contracts.errors import UserError
from contracts.formats import Row
from contracts.importing import PromptReader
from contracts.preflight import Conversation, Finding, StageRequest, findings_of
from contracts.prompts import PromptsConfig
from contracts.records import JsonObjects, Message
from contracts.sources import HUB, read_rows

ROWS = 200_000
"""Maximum number of rows to read from a source."""
PER_KIND = 2
"""Number of conversations to keep of each kind, the first ones; the longest of all is kept as well."""
KINDS = 24
"""Maximum number of kinds, the ones that occur first."""


class SamplingRequest(msgspec.Struct, frozen=True):
    """The request: stages that read the user's data (`prompts`, `sft`)."""

    stages: tuple[StageRequest, ...]


class SampledData(msgspec.Struct):
    """The answer: sampled conversations, and problems of the data."""

    findings: list[Finding] = msgspec.field(default_factory=list)
    """Problems that were found in the data."""
    conversations: list[Conversation] = msgspec.field(default_factory=list)
    unanswered: list[str] = msgspec.field(default_factory=list)
    """Names of the stages whose prompts have no known answers at all."""
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    """Number of distinct prompts by stage name; absent if not all rows were read."""
    unread: list[str] = msgspec.field(default_factory=list)
    """Names of the stages whose source is on the Hub and not in the local cache."""


def sample(request: SamplingRequest) -> SampledData:
    """Pick a few conversations of each source, and collect the problems of its data."""
    answer = SampledData()
    sources: dict[str, Iterator[Conversation]] = {}
    for stage in request.stages:
        key = json.dumps([stage.command, stage.config], sort_keys=True)
        sources.setdefault(key, _prompts(stage, answer) if stage.command == "prompts" else _demonstrations(stage))
    for conversations in sources.values():

        def check(conversations: Iterator[Conversation] = conversations) -> Iterator[Finding]:
            answer.conversations += few_of_each_kind(conversations)
            yield from ()

        answer.findings += findings_of(check)
    return answer


def few_of_each_kind(conversations: Iterator[Conversation]) -> list[Conversation]:
    """The first `PER_KIND` conversations of each of the first `KINDS` kinds, and the longest of the others."""
    kinds: dict[Any, list[Conversation]] = {}
    longest: tuple[int, Conversation | None] = (-1, None)
    for conversation in conversations:
        kind = _kind(conversation)
        kept = kinds.setdefault(kind, []) if kind in kinds or len(kinds) < KINDS else None
        if kept is not None and len(kept) < PER_KIND:
            kept.append(conversation)
            continue
        length = sum(len(message.content) for message in conversation.messages)
        if length > longest[0]:
            longest = (length, conversation)
    chosen = [conversation for kept in kinds.values() for conversation in kept]
    return chosen if longest[1] is None else [*chosen, longest[1]]


def _kind(conversation: Conversation) -> Any:
    """The properties of a conversation that a chat template may treat differently: the first and the last turn, the
    pairs of adjacent turns, the fields that turns have besides text, and whether there are tools."""
    turns = tuple((message.role, not message.content.strip(), _extras(message)) for message in conversation.messages)
    return turns[:1], frozenset(itertools.pairwise(turns)), turns[-1:], conversation.tools is not None


def _extras(message: Message) -> tuple[str, ...]:
    values = msgspec.structs.asdict(message)
    return tuple(
        name for name, value in values.items() if name not in ("role", "content") and value is not msgspec.UNSET
    )


def _prompts(stage: StageRequest, data: SampledData) -> Iterator[Conversation]:
    config = PromptsConfig.model_validate(stage.config)
    source, reader = str(config.source), PromptReader(config)
    rows: Iterable[Row] = read_rows(source, config.split)
    if source.startswith(HUB):
        try:
            rows = [*itertools.islice(rows, ROWS)]
        except UserError:  # the stage itself may access the Hub, and then reports what is wrong
            data.unread.append(stage.name)
            return
    different, answered = set(), 0
    for place, row in itertools.islice(rows, ROWS):
        imported = reader.read(row, place)
        if (prompt := imported.prompt) is not None:
            different.add(int(imported.content, 16))
            answered += bool(prompt.answer and prompt.answer.strip())
            yield Conversation(place, "prompts", prompt.messages, _known(prompt.tools))
    if different and not answered:
        data.unanswered.append(stage.name)
    if reader.layout.rows < ROWS:
        data.counts[stage.name] = min(len(different), config.limit or len(different))
        reader.require_named(source)


def _demonstrations(stage: StageRequest) -> Iterator[Conversation]:
    path = Path(stage.config["demonstrations"])
    for number, row in enumerate(itertools.islice(read_demonstrations(path), ROWS), 1):
        yield Conversation(f"{path}, row {number}", "demonstrations", row.messages, _known(row.tools))


def _known(tools: JsonObjects | msgspec.UnsetType) -> JsonObjects | None:
    return None if tools is msgspec.UNSET else tools


def main() -> None:
    """Answer the request on standard input; data sets of the Hub are read from the local cache only."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with contextlib.redirect_stdout(sys.stderr):
        answer = sample(msgspec.json.decode(sys.stdin.buffer.read(), type=SamplingRequest))
    print(msgspec.json.encode(answer).decode())


if __name__ == "__main__":
    main()
