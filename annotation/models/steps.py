"""The steps of an answer: where they are in its text, how a model is asked about them, and with which of the policy's
tokens each ends. No torch.
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
from contracts.conversations import with_answer, without_beginning
from contracts.errors import UserError
from contracts.preflight import Finding
from contracts.records import Message

ANCHOR = 8
"""Tokens of a beginning that an answer is decoded with, where it goes on from one."""


class StepSpan(NamedTuple):
    """A step of an answer, without the white space around it: characters from `start` to `end`."""

    start: int
    end: int


class StepQuestion(NamedTuple):
    """What a model reads of a sample."""

    ids: list[int]
    """Up to the last token that is read."""
    places: list[int]
    """Of each step, the token that is read, in ascending order."""


def divide(text: str, separator: re.Pattern[str]) -> list[StepSpan]:
    """The steps of an answer. Blank ones are none; a text without any is one step, which may be empty."""
    bounds = [0, *(bound for found in separator.finditer(text) for bound in found.span()), len(text)]
    steps: list[StepSpan] = []
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        said = text[start:end].strip()
        if said:
            begin = text.index(said, start)
            steps.append(StepSpan(begin, begin + len(said)))
    return steps or [StepSpan(0, 0)]


def aggregated(scores: Sequence[float], how: str) -> float:
    """One number by those of all steps."""
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
    """A reward for each token of an answer: 0, but at the last token of each step.

    Args:
        scores: of each step.
        places: its last token.
        tokens: of the answer.
        differences: what each step adds to the score of the one before it (to 0 for the first), instead of its own.
    """
    rewards = [0.0] * tokens
    before = 0.0
    for score, place in zip(scores, places, strict=True):
        rewards[place] += score - before
        before = score if differences else 0.0
    return tuple(rewards)


class StepChat:
    """The tokenizer of a process reward model, and how it is asked."""

    def __init__(self, config: ProcessRewardSettings, date: str | None = None) -> None:
        assert config.model is not None
        self.config = config
        self.chat = ChatTokenizer(config.model, config.chat_template_kwargs, date)

    @functools.cached_property
    def label_ids(self) -> tuple[int, int]:
        """The tokens for a wrong and a right step."""
        bad, good = self._token("bad", self.config.bad), self._token("good", self.config.good)
        if bad == good:
            raise UserError(f"good={self.config.good!r} and bad={self.config.bad!r} are the same token.")
        return bad, good

    @functools.cached_property
    def inserted(self) -> int:
        """The token behind each step."""
        if self.config.layout == "turns":
            return self.label_ids[1]
        assert self.config.marker is not None
        return self._token("marker", self.config.marker)

    def _token(self, key: str, text: str) -> int:
        ids = self.chat.following(text)
        if len(ids) != 1 or ids[0] == self.chat.tokenizer.unk_token_id:
            shown = ", ".join(map(repr, self.chat.tokenizer.convert_ids_to_tokens(ids)))
            raise UserError(
                f"{key}={text!r} is no single token of {self.chat.path} ({shown or 'nothing'}). Give the one that the "
                'model was trained with; where words begin with a blank, with that (" +").'
            )
        return ids[0]

    def question(self, sample: Sample, steps: Sequence[StepSpan]) -> StepQuestion | None:
        """What is read of a sample; None where the template leaves out some of its steps.

        Raises:
            UserError: the template refuses the conversation.
        """
        rollout, text = sample.rollout, sample.completion.text
        messages = [msgspec.structs.replace(each, content=without_slots(each.content)) for each in rollout.messages]
        said = [without_slots(text[step.start : step.end]) for step in steps]
        turns = self._turns(messages, said) if self.config.layout == "turns" else self._marked(messages, text, steps)
        try:
            ids, begins = self.chat.filled(turns, [self.inserted], tools=rollout.tools, what=str(sample))
        except UserError as error:
            raise UserError(f"{sample}: {error}") from error
        if [*begins] != [*range(len(steps))]:
            return None
        before = 1 if self.config.layout == "turns" else 0
        places = [begin - before for begin in begins.values()]
        if places[0] < 1:
            raise UserError(f"{sample}: the chat template of {self.chat.path} writes nothing before the first step.")
        return StepQuestion(ids[: places[-1] + 1], places)

    def _marked(self, messages: Sequence[Message], text: str, steps: Sequence[StepSpan]) -> tuple[Message, ...]:
        """The answer with a slot behind each step."""
        pieces: list[str] = []
        for number, step in enumerate(steps):
            if pieces and self.config.keep_separators:
                pieces.append(without_slots(text[steps[number - 1].end : step.start]))
            pieces += [without_slots(text[step.start : step.end]), slot(number)]
        return with_answer(messages, "".join(pieces))

    @staticmethod
    def _turns(messages: Sequence[Message], said: Sequence[str]) -> list[Message]:
        """Each step said by the user, the first of them behind the question, and answered by a slot."""
        before, begun = without_beginning(messages)
        first, *others = said
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
    """That a model's tokenizer has the tokens that it is asked by.

    Raises:
        UserError: it has not.
    """
    chat = StepChat(config)
    name = repr(chat.chat.tokenizer.convert_ids_to_tokens(chat.inserted))
    where = f"before {name}" if config.layout == "turns" else f"at {name}"
    labels = ""
    if config.loaded_as() == "causal":
        bad, good = map(repr, chat.chat.tokenizer.convert_ids_to_tokens([*chat.label_ids]))
        labels = f", by its probabilities of {good} and {bad}"
    return Finding("ok", f"{config.model}: steps are judged {where}{labels}")


class PolicyTokens:
    """Finds the policy's tokens by the text that they make."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat

    def last_of(self, sample: Sample, steps: Sequence[StepSpan]) -> list[int] | None:
        """Of each step, the stored token with which its text is complete; None where that cannot be told.

        The text of the first tokens, as many as it takes, is compared with the answer's, so that it does not matter how
        characters are divided among tokens. An empty step ends with the answer's last token.
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
