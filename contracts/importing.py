"""The prompts stage: reads rows of various layouts as prompts, each identified by the hash of its content."""

import random
from array import array
from collections import Counter
from typing import Any, NamedTuple

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fields import answer_of, surrogate_error, tags_of, tools_of, with_input, with_system
from contracts.fingerprint import digest
from contracts.jsonl import encode
from contracts.layouts import TEXTS, Layout, SourceRow, without_answer
from contracts.ledger import Ledger
from contracts.near_duplicates import near_duplicates
from contracts.prompts import PromptsConfig, prompt_id
from contracts.records import PROMPTS, Prompt
from contracts.seeds import derive_seed
from contracts.sources import read_rows
from contracts.spool import Spool
from contracts.stage import Context, Outcome

INTENDED = ("held_out", "near_held_out", "near_duplicate")
"""Reasons for drops that the config asks for, which do not count as losses."""
SHARD = "shard-00000.jsonl"
HEX = set("0123456789abcdef")


def run(config: PromptsConfig, context: Context) -> Outcome:
    """Publish the prompts of a source, each once.

    The source may be larger than memory, which holds only a few numbers per row; the prompts are spooled to the disk.
    """
    held_out = [held for path in config.exclude for held in Artifact.open(path, PROMPTS).rows(Prompt)]
    excluded = {prompt_id(held.messages, held.tools) for held in held_out}
    reader, ledger, turns_removed = PromptReader(config), Ledger("rows"), 0
    contents: set[int] = set()
    identities: set[int] = set()
    with Spool(context.publication.directory) as spool:
        for place, row in read_rows(str(config.source), config.split):
            prompt, content, removed = reader.read(row, place)
            turns_removed += removed
            if prompt is None:
                ledger.drop("empty")
                continue
            # A repeated id in the source is as wrong as a repeated conversation.
            known, identity = _number(content), _number(prompt.prompt_id)
            if known in contents or identity in identities:
                if config.duplicates == "error":
                    raise _duplicate(config, reader.id_column, content, prompt.prompt_id, place)
                ledger.drop("duplicate")
                continue
            contents.add(known)
            identities.add(identity)
            if content in excluded:
                ledger.drop("held_out")
                continue
            spool.add(prompt)
        reader.require_named(str(config.source))
        near: dict[int, str] = {}
        if config.near_duplicates is not None:
            near = near_duplicates(spool.records(Prompt), held_out, config.near_duplicates)
            for reason, count in Counter(near.values()).items():
                ledger.drop(reason, count)
        order = array("Q", (number for number in range(len(spool)) if number not in near))
        ledger.keep(len(order))
        _check_losses(config, ledger)
        if config.shuffle_seed is not None:
            random.Random(derive_seed("prompts", config.shuffle_seed)).shuffle(order)
        if config.limit is not None and len(order) > config.limit:
            ledger.kept = config.limit
            ledger.dropped["over_limit"] = len(order) - config.limit
            order = order[: config.limit]
        spool.write(context.publication.scratch(SHARD), order)
    context.publication.commit(SHARD, ledger, rows=len(order))
    facts = {"assistant_turns_removed": turns_removed, "not_read": reader.layout.not_read}
    return Outcome("rows", facts, note=reader.layout.note)


def _number(identity: str) -> int:
    """A prompt id as 64 bits: the bits of a conversation's hash, or those of the hash of any other id."""
    own = len(identity) == 16 and set(identity) <= HEX
    return int(identity, 16) if own else int(digest(identity)[:16], 16)


def _duplicate(config: PromptsConfig, column: str, content: str, identity: str, place: str) -> UserError:
    """The error for a duplicate prompt; reads the source again to find its first occurrence."""
    reader = PromptReader(config)
    for earlier, row in read_rows(str(config.source), config.split):
        prompt, known, _ = reader.read(row, earlier)
        if prompt is None:
            continue
        what = f"conversation {content}" if known == content else f"{column} {identity}"
        if known == content or prompt.prompt_id == identity:
            return UserError(f"{place}: the same {what} as in {earlier}. Remove one of them, or set duplicates=drop.")
    return UserError(f"{config.source} changed while it was read. Import it again.")


def _check_losses(config: PromptsConfig, ledger: Ledger) -> None:
    """Raise UserError if too many rows were dropped, not counting the reasons in `INTENDED`."""
    if not ledger.kept:
        raise UserError(f"{config.source} holds no usable prompt: {ledger}.")
    lost = {reason: count for reason, count in ledger.dropped.items() if reason not in INTENDED}
    Ledger("rows", ledger.kept + sum(lost.values()), ledger.kept, lost).stop_above(
        config.max_dropped, f"prompts of {config.source}"
    )


class Imported(NamedTuple):
    """The result of reading one row."""

    prompt: Prompt | None
    """None if the row is empty."""
    content: str
    """The hash of the conversation."""
    turns_removed: int
    """Number of trailing assistant turns that were removed."""


class PromptReader:
    """Reads the rows of one source as prompts, and counts the columns that are not read."""

    def __init__(self, config: PromptsConfig) -> None:
        self.system = config.system
        self.prefill = config.prefill
        self.answer_after = config.answer_after
        self.answered = 0
        """Number of rows so far that have a known answer."""
        self.layout = Layout(config.named_columns())
        self.id_column = self.layout.named.get("id") or "prompt_id"

    def read(self, values: dict[str, Any], place: str) -> "Imported":
        """Read the prompt of one row.

        Raises:
            UserError: the row has no prompt column, several, or an invalid one; the message names the place.
        """
        row = self.layout.row(values, place)
        column, conversation = row.prompt()
        prefill = conversation[-1:] if self.prefill and conversation and conversation[-1].role == "assistant" else ()
        messages = without_answer(conversation)
        removed = len(conversation) - len(messages) - len(prefill)
        if prefill and (removed or prefill[0].tool_calls):
            raise UserError(
                f"{place}, column {column!r}: the beginning of an answer (prefill) must be one assistant's turn "
                "without tool calls. Correct it, or leave prefill out."
            )
        if not any(message.content.strip() or message.tool_calls for message in messages):
            self.layout.done(row)
            return Imported(None, "", 0)
        if messages[-1].role == "system":
            raise UserError(
                f"{place}, column {column!r}: the conversation ends with a system message, so there is nothing to "
                "answer."
            )
        choices: dict[str, str] = {}
        if column in TEXTS or "input" in self.layout.named or "choices" in self.layout.named:
            messages, choices = with_input(row, column, messages)
        messages = (*with_system(row, messages, self.system), *prefill)
        tools, answer, tags = tools_of(row), self._answer(row, choices), tags_of(row)
        name, identity = row.find("id")
        if not isinstance(identity, str | int | None) or isinstance(identity, bool) or identity == "":
            raise UserError(f"{place}: {name} must be a string or a whole number, found {identity!r}.")
        self.layout.done(row)
        try:
            content = prompt_id(messages, tools)
            prompt = Prompt(content if identity is None else str(identity), messages, answer, tags, tools)
            encode(prompt)
        except UnicodeEncodeError as error:
            raise surrogate_error(place, error) from error
        except ValueError as error:
            raise UserError(f"{place}: a tool or a tool call cannot be written as JSON: {error}.") from error
        return Imported(prompt, content, removed)

    def require_named(self, source: str) -> None:
        """Raise UserError if no row has a column that the config names, or any answer although `answer_after` is set.

        Call it after all rows were read.
        """
        self.layout.require_named(source)
        if self.answer_after is not None and self.layout.rows and not self.answered:
            raise UserError(
                f"{source}: no row has an answer, so answer_after={self.answer_after!r} does not apply. Set "
                "answer_column to the column of the answers, or leave answer_after out."
            )

    def _answer(self, row: SourceRow, choices: dict[str, str]) -> str | None:
        answer = answer_of(row, choices)
        self.answered += bool(answer and answer.strip())
        if answer is None or self.answer_after is None:
            return answer
        _, mark, rest = answer.rpartition(self.answer_after)
        if not mark:
            raise UserError(
                f"{row.place}: the answer {answer[-60:]!r} does not hold answer_after={self.answer_after!r}. "
                "Correct it, or leave answer_after out."
            )
        return rest.strip()
