"""Imports existing preference pairs as rollouts with two answers each, and as scores of these answers.

From there on they are paired, scored by the reference model and trained on like any others. What the data do not say is
recorded as unknown, as for all imported answers: log-probabilities, sampling parameters, seeds, the policy.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from annotation.data.mixing import (
    PreferenceColumn,
    PreferenceSettings,
    PreferencesImportConfig,
    PreferencesScoresConfig,
)
from annotation.data.rlhflow import IMPORTED
from contracts.artifacts import Artifact
from contracts.conversations import read_messages
from contracts.errors import UserError, did_you_mean
from contracts.fields import surrogate_error
from contracts.jsonl import encode, read_jsonl
from contracts.layouts import has_column, look_up
from contracts.ledger import Ledger
from contracts.prompts import EMPTY_PROMPT, is_empty, prompt_id
from contracts.records import PROMPTS, ROLLOUTS, Completion, Message, Prompt, Rollout, Score
from contracts.sources import read_rows
from contracts.stage import Context, Outcome

NAMES: dict[PreferenceColumn, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "chosen_score": ("score_chosen", "chosen_score"),
    "rejected_score": ("score_rejected", "rejected_score"),
}
"""Column names that are recognized without configuration; the first one that exists is used."""
CHOSEN, REJECTED = 0, 1
"""Sample indices of a pair's answers."""


class Preference(NamedTuple):
    """One pair as read from the data."""

    prompt_id: str
    """The prompt's id; from its second pair on with a numeric suffix."""
    messages: tuple[Message, ...]
    answers: tuple[Message, Message]
    """The chosen answer and the rejected one."""
    scores: tuple[float, float]
    """Scores of the two answers; 1 and 0 if the data have none."""


def run_import(config: PreferencesImportConfig, context: Context) -> Outcome:
    """Publish both answers of every pair as a rollout."""
    from contracts.chat import ChatTokenizer

    chat = ChatTokenizer(config.tokenizer, config.chat_template_kwargs, config.date)
    chat.require_stop()
    held_out = {
        prompt_id(held.messages, held.tools)
        for path in config.exclude
        for held in Artifact.open(path, PROMPTS).rows(Prompt)
    }
    dropped, rows = Ledger("pairs"), []
    for found in read_preferences(config):
        made: Rollout | str
        if isinstance(found, Preference):
            made = "held_out" if prompt_id(found.messages) in held_out else _rollout(chat, found)
        else:
            made = found
        if isinstance(made, str):
            dropped.drop(made)
        else:
            rows.append(made)
    _check_losses(config, dropped, len(rows))
    for start in range(0, len(rows), config.shard_size):
        part = rows[start : start + config.shard_size]
        ledger = Ledger("pairs") if start else dropped
        ledger.keep(len(part))
        context.publication.write_rows(f"shard-{start // config.shard_size:05d}.jsonl", part, ledger)
    facts = {"bos_token_id": chat.bos_id, "vocabulary": chat.vocabulary, "tokenizer": chat.fingerprint}
    return Outcome("pairs", {**facts, **chat.counts})


def _check_losses(config: PreferencesImportConfig, dropped: Ledger, kept: int) -> None:
    """Raise UserError if too many pairs were dropped; pairs that were left out on purpose do not count."""
    if not kept:
        raise UserError(f"{config.source} holds no usable pair: {dropped}.")
    lost = Ledger("pairs")
    lost.keep(kept)
    for reason, count in dropped.dropped.items():
        if reason not in ("held_out", "over_limit"):
            lost.drop(reason, count)
    lost.stop_above(config.max_dropped, f"pairs of {config.source}")


def run_scores(config: PreferencesScoresConfig, context: Context) -> Outcome:
    """Publish the scores of both answers of every pair that was imported."""
    rollouts = Artifact.open(config.rollouts, ROLLOUTS)
    found = {pair.prompt_id: pair.scores for pair in read_preferences(config) if isinstance(pair, Preference)}
    for shard in rollouts.shards:
        scores = []
        for rollout in read_jsonl(shard, Rollout):
            if rollout.prompt_id not in found:
                raise UserError(
                    f"{config.source} does not hold the pair {rollout.prompt_id} of {config.rollouts}. Give the source "
                    "and the columns that these rollouts were imported with."
                )
            values = found[rollout.prompt_id]
            scores += [Score(rollout.prompt_id, sample, values[sample]) for sample in (CHOSEN, REJECTED)]
        ledger = Ledger("samples")
        ledger.keep(len(scores))
        context.publication.write_rows(shard.name, scores, ledger)
    return Outcome("samples", {"kind": IMPORTED})


def _rollout(chat: Any, pair: Preference) -> Rollout | str:
    """Tokenize a pair, with its answers ended as the chat template ends them; if that fails, return the reason."""
    completions, prompt = [], []
    for sample, answer in enumerate(pair.answers):
        answered = chat.prompt_and_answer([*pair.messages, answer], what=f"pair {pair.prompt_id}")
        if isinstance(answered, str):
            return answered
        prompt, ids = answered.prompt, tuple(answered.response)
        completions.append(Completion(sample, ids, answer.content, "stop", logprobs=(), seed=None, sampling=None))
    return Rollout(
        prompt_id=pair.prompt_id,
        messages=pair.messages,
        prompt_ids=tuple(prompt),
        completions=tuple(completions),
        policy=IMPORTED,
        iteration=0,
        logprob_mode="raw",
    )


def read_preferences(settings: PreferenceSettings) -> Iterator[Preference | str]:
    """The pairs of a source, in its order; for a row that cannot be used, the reason.

    Raises:
        UserError: the source cannot be read, or a row is not a pair; the message names the row.
    """
    times: Counter[str] = Counter()
    kept = 0
    for place, values in read_rows(str(settings.source), settings.split):
        if settings.limit is not None and kept >= settings.limit:
            yield "over_limit"
            continue
        found = PreferenceRow(values, place, settings.columns).read()
        if not isinstance(found, str):
            kept += 1
            times[found.prompt_id] += 1
            if (number := times[found.prompt_id]) > 1:
                found = found._replace(prompt_id=f"{found.prompt_id}-{number}")
        yield found


class PreferenceRow:
    """One row of a set of pairs."""

    def __init__(self, values: dict[str, Any], place: str, columns: dict[PreferenceColumn, str | None]) -> None:
        self.values = values
        self.place = place
        self.columns = columns

    def read(self) -> Preference | str:
        """The pair, or the reason why it cannot be used."""
        prompt = self._prompt()
        (*before, better), (*other, worse) = (self._conversation(column, prompt) for column in ("chosen", "rejected"))
        if before != other:
            return "different_prompts"
        if not before or (better.role, worse.role) != ("assistant", "assistant"):
            return "no_answer"
        if is_empty(before):
            return EMPTY_PROMPT
        if not (better.content.strip() and worse.content.strip()):
            return "empty"
        if better == worse:
            return "identical_answers"
        scores = self._scores()
        if scores is not None and scores[0] < scores[1]:
            return "scores_disagree"
        messages = tuple(before)
        try:
            encode([*messages, better, worse])
        except UnicodeEncodeError as error:
            raise surrogate_error(self.place, error) from error
        return Preference(prompt_id(messages), messages, (better, worse), scores or (1.0, 0.0))

    def _prompt(self) -> tuple[Message, ...]:
        """The messages in the prompt column, if there is one."""
        name, value = self._find("prompt")
        return () if value is None else read_messages(value, self.place, name, set())

    def _conversation(self, column: PreferenceColumn, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        """The whole conversation that ends with one of the answers; the prompt is part of the column or has its own."""
        name, value = self._find(column)
        if value is None and has_column(self.values, name):
            raise UserError(f"{self.place}: the column {name!r} is null. Remove the row.")
        if value is None:
            raise UserError(
                f"{self.place}: no column {name!r}; found {', '.join(self.values)}."
                f"{did_you_mean(name, self.values, 2)} Set columns={{{column}: NAME}}."
            )
        turns = read_messages(value, self.place, name, set())
        if turns == (Message("user", str(value)),):  # a text without turns
            turns = (Message("assistant", str(value)),)
        if turns and turns[0].role == "assistant":
            if not prompt:
                raise UserError(
                    f"{self.place}, column {name!r}: an answer alone, and no column {' or '.join(NAMES['prompt'])} "
                    "has its prompt. Set columns={prompt: NAME}."
                )
            return (*prompt, *turns)
        if prompt and not {message.content.strip() for message in prompt} <= {turn.content.strip() for turn in turns}:
            raise UserError(
                f"{self.place}: the conversation in {name!r} does not contain the prompt in the prompt's column. "
                "Set columns={prompt: null} if that column is something else."
            )
        return turns or (Message("user", ""),)

    def _scores(self) -> tuple[float, float] | None:
        """The scores of both answers, if the data have them."""
        found = [self._find(column) for column in ("chosen_score", "rejected_score")]
        if all(value is None for _, value in found):
            return None
        for name, value in found:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(
                    f"{self.place}, column {name!r}: a score must be a number, found {value!r}. Set "
                    "columns={chosen_score: null, rejected_score: null} to read none."
                )
        return float(found[0][1]), float(found[1][1])

    def _find(self, column: PreferenceColumn) -> tuple[str, Any]:
        """The name of a column and its value; the value is None if there is no such column."""
        if column in self.columns:
            name = self.columns[column]
            if name is not None and not has_column(self.values, name):
                raise UserError(
                    f"{self.place}: no column {name!r}; found {', '.join(self.values)}."
                    f"{did_you_mean(name, self.values, 2)} Set columns={{{column}: NAME}}."
                )
            return name or column, None if name is None else look_up(self.values, name)
        name = next((name for name in NAMES[column] if self.values.get(name) is not None), NAMES[column][0])
        return name, self.values.get(name)
