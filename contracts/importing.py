"""The prompts stage: from the rows that people have to prompts, each with the hash of its content as its identity."""

import random
from typing import Any, get_args

import msgspec

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.prompts import Column, PromptsConfig, prompt_id
from contracts.records import PROMPTS, Message, Prompt
from contracts.seeds import derive_seed
from contracts.sources import read_rows
from contracts.stage import Context, Outcome

COLUMNS: tuple[str, ...] = get_args(Column)


def run(config: PromptsConfig, context: Context) -> Outcome:
    """Publish the prompts of a source, each once."""
    excluded = {prompt_id(p.messages) for path in config.exclude for p in Artifact.open(path, PROMPTS).rows(Prompt)}
    ledger, facts = Ledger("rows"), {"assistant_turns_removed": 0}
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for place, row in read_rows(str(config.source), config.split):
        prompt, removed = read_prompt(row, place, config)
        facts["assistant_turns_removed"] += removed
        if prompt is None:
            ledger.drop("empty")
            continue
        content = prompt_id(prompt.messages)
        # A given identity that repeats is as wrong as a conversation that does.
        known = {f"conversation {content}": place, f"{config.id_column} {prompt.prompt_id}": place}
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
    ledger.keep(len(prompts))
    _check_losses(config, ledger)
    if config.shuffle_seed is not None:
        random.Random(derive_seed("prompts", config.shuffle_seed)).shuffle(prompts)
    if config.limit is not None and len(prompts) > config.limit:
        ledger.kept = config.limit
        ledger.dropped["over_limit"] = len(prompts) - config.limit
        prompts = prompts[: config.limit]
    context.publication.write_rows("shard-00000.jsonl", prompts, ledger)
    return Outcome("rows", facts)


def _check_losses(config: PromptsConfig, ledger: Ledger) -> None:
    """Stop where too much was lost; what was held out on purpose is no loss."""
    if not ledger.kept:
        raise UserError(f"{config.source} holds no usable prompt: {ledger}.")
    lost = {reason: count for reason, count in ledger.dropped.items() if reason != "held_out"}
    Ledger("rows", ledger.kept + sum(lost.values()), ledger.kept, lost).stop_above(
        config.max_dropped, f"prompts of {config.source}"
    )


def read_prompt(row: dict[str, Any], place: str, config: PromptsConfig) -> tuple[Prompt | None, int]:
    """The prompt of one row (None: it is empty), and how many trailing assistant turns were removed from it.

    Raises:
        UserError: the row has no prompt column, several, or one of the wrong form; names the place.
    """
    column = config.column or _find_column(row, place)
    if row.get(column) is None and column not in row:
        raise UserError(f"{place}: no column {column!r}; found {', '.join(row)}. Set column.")
    messages = _messages(row[column], f"{place}, column {column!r}")
    kept = len(messages)
    while kept and messages[kept - 1].role == "assistant":
        kept -= 1
    removed, messages = len(messages) - kept, messages[:kept]
    if not any(message.content.strip() for message in messages):
        return None, 0
    if messages[-1].role == "system":
        raise UserError(
            f"{place}, column {column!r}: the conversation ends with a system message; nobody asks anything."
        )
    if config.system is not None and messages[0].role != "system":
        messages = (Message("system", config.system), *messages)
    answer = row.get(config.answer_column)
    tags = row.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(f"{place}: tags must be a list of strings, found {tags!r}.")
    identity = row.get(config.id_column)
    if identity is None:
        identity = prompt_id(messages)
    elif not isinstance(identity, str | int) or identity == "":
        raise UserError(f"{place}: {config.id_column} must be a string or a whole number, found {identity!r}.")
    return Prompt(str(identity), messages, None if answer is None else str(answer), tuple(tags)), removed


def _find_column(row: dict[str, Any], place: str) -> str:
    found = [column for column in COLUMNS if row.get(column) is not None]
    if len(found) == 1:
        return found[0]
    if "messages" in found and "prompt" in found and isinstance(row["messages"], list):
        # Chat datasets carry the prompt's text beside the conversation that it begins.
        return "messages"
    if found:
        raise UserError(f"{place}: several columns could be the prompt: {', '.join(found)}. Set column.")
    raise UserError(f"{place}: no column {', '.join(COLUMNS)}; found {', '.join(row) or 'none'}. Set column.")


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    try:
        plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        messages = msgspec.convert(plain, tuple[Message, ...])
        "".join(message.content for message in messages).encode()  # half of a surrogate pair is no text
        return messages
    except (msgspec.ValidationError, TypeError, KeyError, UnicodeEncodeError) as error:
        raise UserError(
            f"{place}: expected a text or a list of {{role, content}} messages ({type(error).__name__}: {error})."
        ) from error
