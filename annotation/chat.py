"""Conversations to token ids: the chat template applied once, by the tokenizer that owns it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import transformers

from contracts.errors import UserError
from contracts.records import Message


class ChatTokenizer:
    """The tokenizer of a model directory that has a chat template."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)

    def conversation(self, messages: Sequence[Message], *, for_answer: bool = False) -> list[int]:
        """Token ids of a conversation; `for_answer` ends them where the assistant's answer begins.

        Raises:
            UserError: the template refuses the conversation, or begins it with two BOS tokens.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=False, add_generation_prompt=for_answer
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise UserError(
                f"the chat template of {self.path} refuses a conversation of the turns {roles}: {error}. "
                "Use prompts with the roles that it knows."
            ) from error
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(
                f"the chat template of {self.path} begins a conversation with two BOS tokens ({bos}), which costs "
                "quality without an error. Remove one of them from its chat_template."
            )
        return ids
