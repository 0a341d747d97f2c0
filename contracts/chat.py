"""Conversations to token ids and back: the chat template applied once, by the tokenizer that owns it.

Imported late by those who need it: transformers is loaded with the first tokenizer, and not everywhere installed.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.records import Message


class ChatTokenizer:
    """The tokenizer of a model directory that has a chat template."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of conversations beyond the context, which are counted by the stages
        logging.disable_progress_bar()
        self.path = path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def conversation(
        self, messages: Sequence[Message], *, for_answer: bool = False, what: str = "a conversation"
    ) -> list[int]:
        """Token ids of a conversation; `for_answer` ends them where the assistant's answer begins.

        Raises:
            UserError: the template refuses the conversation, which `what` names, or begins it with two BOS tokens.
        """
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=False, add_generation_prompt=for_answer
            )
        except TemplateError as error:
            # Templates refuse in their own words (jinja's raise_exception), for example a system turn.
            roles = ", ".join(message.role for message in messages)
            raise UserError(
                f"the chat template of {self.path} refuses {what} of the turns {roles}: {error}. Use conversations "
                "with the roles that it knows, or another model."
            ) from error
        begin = self.tokenizer.bos_token_id
        if begin is not None and begin not in self.stop_ids and ids[:2] == [begin, begin]:
            raise UserError(
                f"the chat template of {self.path} begins {what} with two BOS tokens ({self.tokenizer.bos_token!r}), "
                "which costs quality without an error. Take one out: of its chat_template, of the tokenizer's "
                "post-processor, or of the text."
            )
        return ids

    @property
    def vocabulary(self) -> str:
        """Digest of what each token id stands for; two models with the same one can read each other's ids."""
        return digest(self.tokenizer.get_vocab())

    @property
    def begin_id(self) -> int | None:
        """The token that only ever begins; None where there is none, or where it ends answers as well (GPT-2)."""
        begin: int | None = self.tokenizer.bos_token_id
        return None if begin in self.stop_ids else begin

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's EOS first, then those of generation_config.json (or config.json).

        Empty for a model that never answers, such as a reward model.
        """
        end = self.tokenizer.eos_token_id
        found = [] if end is None else [int(end)]
        for name in ("generation_config.json", "config.json"):
            path = self.path / name
            ids = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
            if ids is not None:
                found += ids if isinstance(ids, list) else [ids]
                break
        return tuple(dict.fromkeys(found))

    def require_stop(self) -> None:
        """Raise UserError unless there is a token that ends an answer."""
        if not self.stop_ids:
            raise UserError(
                f"{self.path} names no EOS token, so no answer could ever end. Set eos_token in its "
                'tokenizer_config.json, or "eos_token_id" in its generation_config.json.'
            )

    def text(self, response_ids: Sequence[int]) -> str:
        """A response without its stop token and other special tokens."""
        ids = list(response_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
