"""Imports and exports RLHFlow's format: `{"prompt": [messages], "responses": [texts], "rewards": [numbers]}`.

Its files hold text only. An import tokenizes each prompt and each response once, ends every response as the chat
template ends an answer, and sets finish_reason "stop", as the files do not say which answers were truncated. Everything
else that they do not say is recorded as unknown: log-probabilities, sampling parameters, seeds, the policy.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from annotation.config import RlhflowExportConfig, RlhflowImportConfig, RlhflowScoresConfig
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fields import surrogate_error, tools_of
from contracts.formats import read_file
from contracts.joining import join
from contracts.jsonl import encode, read_jsonl, write_jsonl
from contracts.layouts import Layout
from contracts.ledger import Ledger, merge
from contracts.prompts import EMPTY_PROMPT, is_empty, prompt_id
from contracts.records import ROLLOUTS, SCORES, Completion, JsonObjects, Message, Rollout, Schema, Score
from contracts.stage import Context, Outcome

RLHFLOW = Schema("rlhflow", 1)
FILE = "rlhflow.jsonl"
IMPORTED = "imported"


class RlhflowRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One prompt with its answers."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    rewards: tuple[float | None, ...] | None = None
    tools: JsonObjects | UnsetType = UNSET
    """Extension of RLHFlow's format; present only if the prompt has tools."""
    answer: str | None = None
    """Extension of RLHFlow's format: the prompt's known answer."""


Answers = tuple[tuple[str, ...], tuple[float | None, ...] | None]


class RlhflowFile:
    """Reads the rows of an RLHFlow file, and records which of their keys were not read."""

    def __init__(self, path: Path, answer_column: str | None = None) -> None:
        self.path = path
        self.answer_column = answer_column
        self.layout = Layout({"prompt": "prompt"})

    def rows(self) -> Iterator[tuple[str, RlhflowRow]]:
        """All rows with their places, in either format: JSON Lines, or one JSON file with `instances`.

        Raises:
            UserError: the file is missing, empty or damaged, or a row has the wrong format; the message names the row.
        """
        if not self.path.is_file():
            raise UserError(f"source {self.path} is not a file. Give the .json or .jsonl file that RLHFlow wrote.")
        for place, values in read_file(self.path):
            yield place, self._read(values, place)
        if not self.layout.rows:
            raise UserError(f"{self.path} holds no rows.")

    def _read(self, values: dict[str, Any], place: str) -> RlhflowRow:
        row = self.layout.row(values, place)
        _, messages = row.prompt()
        given = (values.get(row.read("responses")), values.get(row.read("rewards")))
        try:
            responses, rewards = msgspec.convert(given, Answers)
            answer = None if self.answer_column is None else values.get(row.read(self.answer_column))
            if not isinstance(answer, str | None):
                raise UserError(f"{place}: {self.answer_column} must be a text, found {answer!r:.80}.")
            found = RlhflowRow(messages, responses, rewards, tools_of(row), answer)
            encode(found)
        except msgspec.ValidationError as error:
            raise UserError(
                f"{place}: {error}. Each row needs `prompt` and `responses`, a list of texts, and may have `rewards`, "
                "a list of numbers."
            ) from error
        except UnicodeEncodeError as error:
            raise surrogate_error(place, error) from error
        if rewards is not None and len(rewards) != len(responses):
            raise UserError(
                f"{place}: {len(rewards)} rewards for {len(responses)} responses. Give one reward for each response."
            )
        self.layout.done(row)
        return found


def run_export(config: RlhflowExportConfig, context: Context) -> Outcome:
    """Publish `rlhflow.jsonl`."""
    rollouts = Artifact.open(config.rollouts, ROLLOUTS)
    scores = {} if config.scores is None else {"rewards": Artifact.open(config.scores, SCORES)}
    ledger = Ledger("samples")

    def rows() -> Iterator[RlhflowRow]:
        for rollout, found in join(rollouts, scores):
            rewards = found.get("rewards")
            kept = [sample for sample in rollout.completions if rewards is None or sample.sample in rewards]
            ledger.keep(len(kept))
            ledger.drop("unscored", len(rollout.completions) - len(kept))
            if kept:
                texts = tuple(sample.text for sample in kept)
                values = None if rewards is None else tuple(rewards[sample.sample].score for sample in kept)
                yield RlhflowRow(rollout.messages, texts, values, rollout.tools)

    count = write_jsonl(context.publication.scratch(FILE), rows())
    context.publication.commit(FILE, ledger, rows=count)
    return Outcome("samples", weights=rollouts.manifest.weights)


def run_import(config: RlhflowImportConfig, context: Context) -> Outcome:
    """Publish the file's answers as rollouts."""
    source = RlhflowFile(config.source, config.answer_column)
    rows = [row for _, row in source.rows()]
    from contracts.chat import ChatTokenizer

    chat = ChatTokenizer(config.tokenizer, config.chat_template_kwargs, config.date)
    chat.require_stop()
    seen: set[str] = set()
    for start in range(0, len(rows), config.shard_size):
        ledger = Ledger("samples")
        rollouts = []
        for row in rows[start : start + config.shard_size]:
            key = prompt_id(row.prompt, row.tools)
            if key in seen:
                ledger.drop("duplicate_prompt", len(row.responses))
                continue
            seen.add(key)
            if is_empty(row.prompt):
                ledger.drop(EMPTY_PROMPT, len(row.responses))
                continue
            rollout = _rollout(config, chat, key, row, ledger)
            if rollout is not None:
                rollouts.append(rollout)
        name = f"shard-{start // config.shard_size:05d}.jsonl"
        context.publication.write_rows(name, rollouts, ledger)
    total = merge((receipt.ledger for receipt in context.publication.receipts().values()), "samples")
    total.stop_above(config.max_dropped, f"import of {config.source}")
    return Outcome("samples", {"not_read": source.layout.not_read}, note=source.layout.note)


def _rollout(config: RlhflowImportConfig, chat: Any, key: str, row: RlhflowRow, ledger: Ledger) -> Rollout | None:
    """Tokenize a row, with its answers ended as the chat template ends them; None if that fails for all answers."""
    prompt: list[int] = []
    completions = []
    for sample, text in enumerate(row.responses):
        answered = chat.prompt_and_answer(
            [*row.prompt, Message("assistant", text)], tools=row.tools, what=f"prompt {key}"
        )
        if isinstance(answered, str):
            ledger.drop(answered)
            continue
        ledger.keep()
        prompt = answered.prompt
        ids = tuple(answered.response)
        completions.append(Completion(sample, ids, text, "stop", logprobs=(), seed=None, sampling=None))
    if not completions:
        return None
    return Rollout(
        prompt_id=key,
        messages=row.prompt,
        prompt_ids=tuple(prompt),
        completions=tuple(completions),
        policy=IMPORTED,
        iteration=config.iteration,
        logprob_mode="raw",
        answer=row.answer,
        tools=row.tools,
    )


def run_scores(config: RlhflowScoresConfig, context: Context) -> Outcome:
    """Publish the file's rewards, one shard for each shard of rollouts."""
    rollouts = Artifact.open(config.rollouts, ROLLOUTS)
    rows: dict[str, RlhflowRow] = {}
    for place, row in RlhflowFile(config.source).rows():
        if row.rewards is None:
            raise UserError(f"{place}: the row has no rewards. Score the rollouts with `annotation score`.")
        rows.setdefault(prompt_id(row.prompt, row.tools), row)
    for shard in rollouts.shards:
        ledger = Ledger("samples")
        scores = [score for rollout in read_jsonl(shard, Rollout) for score in _scores(config, rows, rollout, ledger)]
        context.publication.write_rows(shard.name, scores, ledger)
    total = merge((receipt.ledger for receipt in context.publication.receipts().values()), "samples")
    total.stop_above(config.max_dropped, f"rewards of {config.source}")
    return Outcome("samples", {"scorer": config.name, "kind": IMPORTED})


def _scores(
    config: RlhflowScoresConfig, rows: dict[str, RlhflowRow], rollout: Rollout, ledger: Ledger
) -> Iterator[Score]:
    row = rows.get(rollout.prompt_id)
    texts = {completion.sample: completion.text for completion in rollout.completions}
    if row is None or any(row.responses[sample : sample + 1] != (text,) for sample, text in texts.items()):
        raise UserError(
            f"{config.source} does not hold the answers of prompt {rollout.prompt_id} in {config.rollouts}. "
            "Give the file that these rollouts were imported from."
        )
    rewards = row.rewards or ()
    for completion in rollout.completions:
        reward = rewards[completion.sample]
        if reward is None or not math.isfinite(reward):
            ledger.drop("unscored")
        else:
            ledger.keep()
            yield Score(rollout.prompt_id, completion.sample, reward)
