"""Splits answers into steps, builds the model inputs that score them, and finds the policy's tokens that end them.

Needs no torch.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from annotation.samples import Sample
from annotation.scorers.process_reward import ProcessRewardSettings
from contracts.chat import ChatTokenizer, slot, without_slots
from contracts.conversations import split_prefill, with_answer
from contracts.errors import UserError
from contracts.preflight import Finding
from contracts.records import Message

ANCHOR = 8
"""Number of preceding tokens that a response is decoded with, if it continues a prefill."""


class StepSpan(NamedTuple):
    """A step of an answer, without surrounding whitespace: the characters from `start` to `end`."""

    start: int
    end: int


class StepInput(NamedTuple):
    """The model's input for a sample."""

    ids: list[int]
    """Token ids, up to the last position whose output is read."""
    places: list[int]
    """For each step, the position whose output is read, in ascending order."""


def divide(text: str, separator: re.Pattern[str]) -> list[StepSpan]:
    """The steps of an answer. Blank ones are skipped; a text without any step is one empty step."""
    bounds = [0, *(bound for found in separator.finditer(text) for bound in found.span()), len(text)]
    steps: list[StepSpan] = []
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        step = text[start:end].strip()
        if step:
            begin = text.index(step, start)
            steps.append(StepSpan(begin, begin + len(step)))
    return steps or [StepSpan(0, 0)]


def aggregate(scores: Sequence[float], how: str) -> float:
    """Aggregate the scores of all steps into one number, by the method `how`."""
    if how == "last":
        return scores[-1]
    if how == "min":
        return min(scores)
    if how == "product":
        return math.prod(scores)
    return math.fsum(scores) / (len(scores) if how == "mean" else 1)


def token_rewards(
    scores: Sequence[float], places: Sequence[int], tokens: int, *, differences: bool
) -> tuple[float, ...]:
    """A reward for each token of an answer: 0, except at the last token of each step.

    Args:
        scores: score of each step.
        places: index of each step's last token.
        tokens: number of tokens of the answer.
        differences: reward a step with its score minus the previous step's (minus 0 for the first), instead of with its
            score.
    """
    rewards = [0.0] * tokens
    before = 0.0
    for score, place in zip(scores, places, strict=True):
        rewards[place] += score - before
        before = score if differences else 0.0
    return tuple(rewards)


class StepChat:
    """Builds the inputs of a process reward model with its tokenizer and chat template."""

    def __init__(self, config: ProcessRewardSettings, date: str | None = None) -> None:
        assert config.model is not None
        self.config = config
        self.chat = ChatTokenizer(config.model, config.chat_template_kwargs, date)

    @functools.cached_property
    def label_ids(self) -> tuple[int, int]:
        """The label tokens for a wrong and for a right step."""
        bad, good = self._token("bad", self.config.bad), self._token("good", self.config.good)
        if bad == good:
            raise UserError(f"good={self.config.good!r} and bad={self.config.bad!r} are the same token.")
        return bad, good

    @functools.cached_property
    def inserted_token(self) -> int:
        """The token that is inserted after each step."""
        if self.config.layout == "turns":
            return self.label_ids[1]
        assert self.config.marker is not None
        return self._token("marker", self.config.marker)

    def _token(self, key: str, text: str) -> int:
        ids = self.chat.encode_continuation(text)
        if len(ids) != 1 or ids[0] == self.chat.tokenizer.unk_token_id:
            shown = ", ".join(map(repr, self.chat.tokenizer.convert_ids_to_tokens(ids)))
            raise UserError(
                f"{key}={text!r} is not a single token of {self.chat.path} ({shown or 'nothing'}). Give the token "
                'that the model was trained with; if tokens include a leading blank, with that blank (" +").'
            )
        return ids[0]

    def inputs_of(self, sample: Sample, steps: Sequence[StepSpan]) -> StepInput | None:
        """The model's input for a sample; None if the chat template leaves out some of its steps.

        Raises:
            UserError: the template rejects the conversation.
        """
        rollout, text = sample.rollout, sample.completion.text
        messages = [msgspec.structs.replace(each, content=without_slots(each.content)) for each in rollout.messages]
        texts = [without_slots(text[step.start : step.end]) for step in steps]
        turns = self._turns(messages, texts) if self.config.layout == "turns" else self._marked(messages, text, steps)
        try:
            ids, begins = self.chat.with_slots_filled(
                turns, [self.inserted_token], tools=rollout.tools, what=str(sample)
            )
        except UserError as error:
            raise UserError(f"{sample}: {error}") from error
        if [*begins] != [*range(len(steps))]:
            return None
        before = 1 if self.config.layout == "turns" else 0
        places = [begin - before for begin in begins.values()]
        if places[0] < 1:
            raise UserError(f"{sample}: the chat template of {self.chat.path} writes nothing before the first step.")
        return StepInput(ids[: places[-1] + 1], places)

    def _marked(self, messages: Sequence[Message], text: str, steps: Sequence[StepSpan]) -> tuple[Message, ...]:
        """The conversation with a slot after each step of the answer."""
        pieces: list[str] = []
        for number, step in enumerate(steps):
            if pieces and self.config.keep_separators:
                pieces.append(without_slots(text[steps[number - 1].end : step.start]))
            pieces += [without_slots(text[step.start : step.end]), slot(number)]
        return with_answer(messages, "".join(pieces))

    @staticmethod
    def _turns(messages: Sequence[Message], texts: Sequence[str]) -> list[Message]:
        """The conversation with each step as a user turn, the first one appended to the prompt, and a slot as the
        reply."""
        before, begun = split_prefill(messages)
        first, *others = texts
        first = begun + first
        *earlier, last = before
        if last.role == "user":
            opening = [*earlier, msgspec.structs.replace(last, content=f"{last.content} {first}")]
        else:
            opening = [*before, Message("user", first)]
        turns = [*opening, Message("assistant", slot(0))]
        for number, step in enumerate(others, 1):
            turns += [Message("user", step), Message("assistant", slot(number))]
        return turns


def tokens_found(config: ProcessRewardSettings) -> Finding:
    """Check that the marker and the labels are tokens of the model's tokenizer.

    Raises:
        UserError: one is not.
    """
    chat = StepChat(config)
    name = repr(chat.chat.tokenizer.convert_ids_to_tokens(chat.inserted_token))
    where = f"before {name}" if config.layout == "turns" else f"at {name}"
    labels = ""
    if config.loaded_as() == "causal":
        bad, good = map(repr, chat.chat.tokenizer.convert_ids_to_tokens([*chat.label_ids]))
        labels = f", by its probabilities of {good} and {bad}"
    return Finding("ok", f"{config.model}: steps are scored {where}{labels}")


class PolicyTokens:
    """Maps positions in an answer's text to the policy's tokens."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat

    def last_tokens(self, sample: Sample, steps: Sequence[StepSpan]) -> list[int] | None:
        """For each step, the index of the stored token that completes its text; None if it cannot be determined.

        The search compares decoded prefixes of the tokens with the answer's text, so it does not matter how characters
        are divided among tokens. An empty step ends with the answer's last token.
        """
        ids, text = sample.completion.response_ids, sample.completion.text
        messages, prompt = sample.rollout.messages, sample.rollout.prompt_ids
        begun = prompt[-ANCHOR:] if messages and messages[-1].role == "assistant" else ()

        def reaches(count: int, end: int) -> bool:
            found = self.chat.text(ids[:count], begun)
            return len(found) >= end and found[:end] == text[:end]

        if not reaches(len(ids), steps[-1].end):
            return None
        places: list[int] = []
        low = 0
        for step in steps:
            high = len(ids)
            while low < high:
                middle = (low + high) // 2
                if reaches(middle, step.end):
                    high = middle
                else:
                    low = middle + 1
            places.append(low - 1 if step.end else len(ids) - 1)
        return places
