"""The prompts stage: from the rows that people have to prompts, each with the hash of its content as its identity."""

import random
from typing import Any, NamedTuple

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fields import answer_of, half_a_character, tags_of, tools_of, with_input, with_system
from contracts.jsonl import encode
from contracts.layouts import TEXTS, Layout, without_answer
from contracts.ledger import Ledger
from contracts.prompts import PromptsConfig, prompt_id
from contracts.records import PROMPTS, Prompt
from contracts.seeds import derive_seed
from contracts.sources import read_rows
from contracts.stage import Context, Outcome


def run(config: PromptsConfig, context: Context) -> Outcome:
    """Publish the prompts of a source, each once."""
    excluded = {
        prompt_id(held.messages, held.tools)
        for path in config.exclude
        for held in Artifact.open(path, PROMPTS).rows(Prompt)
    }
    reader, ledger, turns_removed = PromptReader(config), Ledger("rows"), 0
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for place, row in read_rows(str(config.source), config.split):
        prompt, content, removed = reader.read(row, place)
        turns_removed += removed
        if prompt is None:
            ledger.drop("empty")
            continue
        # A given identity that repeats is as wrong as a conversation that does.
        known = {f"conversation {content}": place, f"{reader.id_column} {prompt.prompt_id}": place}
        again = [name for name in known if name in places]
        if again and config.duplicates == "error":
            raise UserError(
                f"{place}: the same {again[0]} as in {places[again[0]]}. Remove one of them, or set duplicates=drop."
            )
        if again:
            ledger.drop("duplicate")
            continue
        places.update(known)
        if content in excluded:
            ledger.drop("held_out")
            continue
        prompts.append(prompt)
    reader.layout.require_named(str(config.source))
    ledger.keep(len(prompts))
    _check_losses(config, ledger)
    if config.shuffle_seed is not None:
        random.Random(derive_seed("prompts", config.shuffle_seed)).shuffle(prompts)
    if config.limit is not None and len(prompts) > config.limit:
        ledger.kept = config.limit
        ledger.dropped["over_limit"] = len(prompts) - config.limit
        prompts = prompts[: config.limit]
    context.publication.write_rows("shard-00000.jsonl", prompts, ledger)
    facts = {"assistant_turns_removed": turns_removed, "not_read": reader.layout.not_read}
    return Outcome("rows", facts, note=reader.layout.note)


def _check_losses(config: PromptsConfig, ledger: Ledger) -> None:
    """Stop where too much was lost; what was held out on purpose is no loss."""
    if not ledger.kept:
        raise UserError(f"{config.source} holds no usable prompt: {ledger}.")
    lost = {reason: count for reason, count in ledger.dropped.items() if reason != "held_out"}
    Ledger("rows", ledger.kept + sum(lost.values()), ledger.kept, lost).stop_above(
        config.max_dropped, f"prompts of {config.source}"
    )


class Imported(NamedTuple):
    """What one row is."""

    prompt: Prompt | None
    """None: it is empty."""
    content: str
    """The hash of its conversation."""
    turns_removed: int
    """Trailing assistant turns that were taken away."""


class PromptReader:
    """Reads the rows of one source as prompts, and counts the columns that it does not read."""

    def __init__(self, config: PromptsConfig) -> None:
        self.system = config.system
        self.layout = Layout(config.named_columns())
        self.id_column = self.layout.named.get("id") or "prompt_id"

    def read(self, values: dict[str, Any], place: str) -> "Imported":
        """The prompt of one row.

        Raises:
            UserError: the row has no prompt column, several, or one of the wrong form; names the place.
        """
        row = self.layout.row(values, place)
        column, conversation = row.prompt()
        messages = without_answer(conversation)
        removed = len(conversation) - len(messages)
        if not any(message.content.strip() or message.tool_calls for message in messages):
            self.layout.done(row)
            return Imported(None, "", 0)
        if messages[-1].role == "system":
            raise UserError(
                f"{place}, column {column!r}: the conversation ends with a system message; nobody asks anything."
            )
        choices: dict[str, str] = {}
        if column in TEXTS or "input" in self.layout.named or "choices" in self.layout.named:
            messages, choices = with_input(row, column, messages)
        messages = with_system(row, messages, self.system)
        tools, answer, tags = tools_of(row), answer_of(row, choices), tags_of(row)
        name, identity = row.find("id")
        if not isinstance(identity, str | int | None) or isinstance(identity, bool) or identity == "":
            raise UserError(f"{place}: {name} must be a string or a whole number, found {identity!r}.")
        self.layout.done(row)
        try:
            content = prompt_id(messages, tools)
            prompt = Prompt(content if identity is None else str(identity), messages, answer, tags, tools)
            encode(prompt)
        except UnicodeEncodeError as error:
            raise half_a_character(place, error) from error
        except ValueError as error:
            raise UserError(f"{place}: a tool or its call holds what JSON cannot say: {error}.") from error
        return Imported(prompt, content, removed)
