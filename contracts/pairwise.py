"""Builds the input of a pairwise preference model, which predicts which of two answers is better.

The whole conversation and both answers become the text of one user message, the model's own chat template is applied
to that message once, and the next token, one of two labels, is the verdict. The format is that of RLHFlow's pairwise
preference models (Dong et al. 2024, arXiv 2405.07863, section 2.2), so that these can be used as they are.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from contracts.chat import ChatTokenizer, Tools
from contracts.conversations import split_prefill
from contracts.errors import UserError
from contracts.records import Message

LABELS = ("A", "B")
"""The labels that the model predicts: the first answer is better, or the second."""


def question(messages: Sequence[Message], first: str, second: str, tools: Tools = msgspec.UNSET) -> str:
    """The text of the user message: the turns of the conversation, then both answers.

    Tools come first, as a turn of their own; tool calls follow the text of their turn; both are written as JSON. A
    prefill (the last turn) is prepended to both answers.
    """
    messages, prefill = split_prefill(messages)
    first, second = prefill + first, prefill + second
    given = "" if tools is msgspec.UNSET or not tools else f"\n<turn> tools\n {_json(tools)}"
    turns = "".join(f"\n<turn> {message.role}\n {_text(message)}" for message in messages)
    return f"[CONTEXT] \n{given}{turns}\n [RESPONSE A] {first} [RESPONSE B] {second} \n"


class PairwiseChat:
    """The tokenizer of a pairwise preference model."""

    def __init__(self, path: Path, variables: dict[str, Any] | None = None, date: str | None = None) -> None:
        """Load it; the arguments are those of `ChatTokenizer`."""
        self.path = path
        self.chat = ChatTokenizer(path, variables, date)

    def token_ids(
        self, messages: Sequence[Message], first: str, second: str, what: str, tools: Tools = msgspec.UNSET
    ) -> list[int]:
        """Token ids of the question up to where the label follows; `what` names it in messages.

        Raises:
            UserError: the chat template refuses a user message, or begins with two BOS tokens.
        """
        text = question(messages, first, second, tools)
        return self.chat.conversation([Message("user", text)], for_answer=True, what=what)

    @functools.cached_property
    def label_ids(self) -> tuple[int, int]:
        """The token ids of the labels, in the form ("A" or " A") that is a single token after the generation prompt.

        Raises:
            UserError: in neither form are the labels two different single tokens.
        """
        tokenizer = self.chat.tokenizer
        prompt = self.chat.render([Message("user", "?")], for_answer=True)
        before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for space in ("", " "):
            found = [tokenizer(prompt + space + label, add_special_tokens=False)["input_ids"] for label in LABELS]
            first, second = (ids[len(before) :] for ids in found)
            single = len(first) == len(second) == 1 and all(ids[: len(before)] == before for ids in found)
            if single and first != second and tokenizer.unk_token_id not in (*first, *second):
                return first[0], second[0]
        raise UserError(
            f"the tokenizer of {self.path} has no single token for each of the labels {' and '.join(LABELS)} after "
            "its generation prompt, so it cannot be a pairwise preference model. Take a model whose tokenizer has them."
        )


def _text(message: Message) -> str:
    if message.tool_calls is msgspec.UNSET or not message.tool_calls:
        return message.content
    return "\n ".join(part for part in (message.content, _json(message.tool_calls)) if part)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
