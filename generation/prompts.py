"""Selects prompts, and renders them as token ids."""

from contracts.artifacts import Artifact
from contracts.chat import ChatTokenizer
from contracts.engine_args import require_known
from contracts.errors import UserError
from contracts.models import ModelInfo
from contracts.records import PROMPTS, Prompt
from contracts.template import TemplateRefusedError
from generation.config import GenerationConfig
from modeling.vllm_process import require_head_width


def check_policy(config: GenerationConfig) -> int | None:
    """Check the policy without torch; returns the maximum prompt length in tokens, None if it is unlimited.

    Raises:
        UserError: it is not a causal language model, has no chat template or heads that vLLM cannot compute here, or
            the lengths exceed its context.
    """
    info = ModelInfo.read(config.policy)
    info.require_causal()
    info.require_engine(config.engine)
    info.require_chat_template()
    require_known(config.engine_args)
    if config.engine == "vllm":
        require_head_width(info)
    if config.max_prompt_tokens is not None:
        total = config.max_prompt_tokens + config.max_new_tokens
        info.require_length(total, "max_prompt_tokens + max_new_tokens")
        return config.max_prompt_tokens
    info.require_length(config.max_new_tokens + 1, "max_new_tokens, with at least one token of prompt,")
    return None if info.context_length is None else info.context_length - config.max_new_tokens


def select_prompts(config: GenerationConfig) -> list[Prompt]:
    """Select `count` prompts from `start` on, wrapping around at the end of the set.

    Empty for a draw of dynamic sampling in which no prompt had to be replaced.

    Raises:
        UserError: nothing is published there, there are no prompts, or fewer than `count`.
    """
    artifact = Artifact.open(config.prompts, PROMPTS)
    total = artifact.manifest.rows
    if not total and artifact.manifest.stage == "draw" and config.count is None:
        return []
    if not total:
        raise UserError(f"{config.prompts} holds no prompts. Import some first, or name another set.")
    count = total if config.count is None else config.count
    if count > total:
        raise UserError(
            f"count={count} is more than the {total} prompts of {config.prompts}, and no prompt is used twice "
            "in one stage. Lower count (in a run: prompts.per_iteration), or raise k for more answers per prompt."
        )
    # The set may be larger than memory, but the selection is not.
    places = ((place - config.start) % total for place in range(total))
    chosen = {place: prompt for place, prompt in zip(places, artifact.rows(Prompt), strict=True) if place < count}
    return [chosen[place] for place in range(count)]


def prompt_ids(tokenizer: ChatTokenizer, prompt: Prompt, *, drop: bool = False) -> tuple[int, ...] | None:
    """Render a conversation as token ids with the policy's chat template, including the generation prompt.

    Args:
        tokenizer: the policy's tokenizer.
        prompt: the prompt.
        drop: return None if the template refuses the conversation, instead of raising.
    """
    what = f"prompt {prompt.prompt_id}"
    try:
        return tuple(tokenizer.conversation(prompt.messages, tools=prompt.tools, for_answer=True, what=what))
    except TemplateRefusedError:
        if drop:
            return None
        raise
