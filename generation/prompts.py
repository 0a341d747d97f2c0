"""Selecting prompts and rendering them as token ids."""

from contracts.artifacts import Artifact
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.models import ModelInfo
from contracts.records import PROMPTS, Prompt
from generation.config import GenerationConfig


def check_policy(config: GenerationConfig) -> int | None:
    """Check what can be checked without torch; return the longest prompt that fits (tokens), None if unlimited.

    Raises:
        UserError: no causal language model, no chat template, or lengths beyond the model's context.
    """
    info = ModelInfo.read(config.policy)
    info.require_causal()
    info.require_engine(config.engine)
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


def prompt_ids(tokenizer: ChatTokenizer, prompt: Prompt) -> tuple[int, ...]:
    """The conversation rendered by the policy's chat template, with the generation prompt, as token ids."""
    what = f"prompt {prompt.prompt_id}"
    return tuple(tokenizer.conversation(prompt.messages, tools=prompt.tools, for_answer=True, what=what))
