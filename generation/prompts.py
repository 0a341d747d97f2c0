"""Prompts to token ids: the chat template, applied once, here and nowhere else."""

import json
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.models import ModelInfo
from contracts.records import PROMPTS, Message, Prompt
from generation.config import GenerationConfig


def check_policy(config: GenerationConfig) -> int | None:
    """Check what can be checked without torch; return the longest prompt that fits (tokens), None if unlimited.

    Raises:
        UserError: no causal language model, no chat template, or lengths beyond the model's context.
    """
    info = ModelInfo.read(config.policy)
    info.require_causal()
    info.require_chat_template()
    if config.max_prompt_tokens is not None:
        total = config.max_prompt_tokens + config.max_new_tokens
        info.require_length(total, "max_prompt_tokens + max_new_tokens")
        return config.max_prompt_tokens
    info.require_length(config.max_new_tokens + 1, "max_new_tokens, with at least one token of prompt,")
    return None if info.context_length is None else info.context_length - config.max_new_tokens


def select_prompts(config: GenerationConfig) -> list[Prompt]:
    """`count` prompts from `start` on, going round at the end of the set.

    Raises:
        UserError: nothing is published there, there are no prompts, or fewer than `count`.
    """
    prompts = list(Artifact.open(config.prompts, PROMPTS).rows(Prompt))
    if not prompts:
        raise UserError(f"{config.prompts} holds no prompts. Import some first, or name another set.")
    count = len(prompts) if config.count is None else config.count
    if count > len(prompts):
        raise UserError(
            f"count={count} is more than the {len(prompts)} prompts of {config.prompts}, and no prompt is used twice "
            "in one stage. Lower count (in a run: prompts.per_iteration), or raise k for more answers per prompt."
        )
    return [prompts[(config.start + offset) % len(prompts)] for offset in range(count)]


class ChatTokenizer:
    """The policy's tokenizer: conversations to token ids, answers to text."""

    def __init__(self, policy: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of prompts beyond the context, which are counted here
        logging.disable_progress_bar()
        self.policy = policy
        self._tokenizer: Any = AutoTokenizer.from_pretrained(policy)
        self.stop_ids = self._read_stop_ids()
        bos = self._tokenizer.bos_token_id
        self.bos_id: int | None = None if bos in self.stop_ids else bos
        """The token that only ever begins; None where there is none, or where it ends answers as well (GPT-2)."""

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The conversation as the policy was trained to see it, up to where its answer begins.

        Raises:
            UserError: the template refuses the conversation, or begins it with two BOS tokens.
        """
        from jinja2 import TemplateError

        messages = [_plain(message) for message in prompt.messages]
        try:
            ids = self._tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.policy} refuses prompt {prompt.prompt_id}: {error}. "
                "Change the prompt's messages, or use another policy."
            ) from error
        if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            raise UserError(
                f"the chat template of {self.policy} begins a prompt with two BOS tokens "
                f"({self._tokenizer.bos_token!r}). Remove one: from chat_template.jinja, or from the text of prompt "
                f"{prompt.prompt_id}."
            )
        return tuple(ids)

    def text(self, response_ids: tuple[int, ...]) -> str:
        """A response without its stop token and other special tokens."""
        if response_ids and response_ids[-1] in self.stop_ids:
            response_ids = response_ids[:-1]
        return str(self._tokenizer.decode(list(response_ids), skip_special_tokens=True))

    def _read_stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of generation_config.json (or config.json), and the tokenizer's EOS."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            path = self.policy / name
            ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
            if ids is not None:
                found.update(ids if isinstance(ids, list) else [ids])
                break
        if self._tokenizer.eos_token_id is not None:
            found.add(self._tokenizer.eos_token_id)
        if not found:
            raise UserError(
                f"{self.policy} names no end-of-sequence token, so that no answer would ever end. "
                'Set eos_token in its tokenizer_config.json, or "eos_token_id" in its generation_config.json.'
            )
        return tuple(sorted(found))


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
