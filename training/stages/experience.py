"""Declares the stage `experience`, which turns scored samples into what an algorithm trains on."""

from dataclasses import dataclass

from contracts.declaration import Stage
from contracts.outlook import (
    ID_BYTES,
    LOGPROB_BYTES,
    PROCESS_BYTES,
    SAMPLE_BYTES,
    STAGE_BYTES,
    AnswerStats,
    Memory,
    Outlook,
)
from contracts.records import EXPERIENCE
from training.config import ExperienceConfig

NUMBERS_PER_TOKEN = 20
"""Numbers per response token that the stage holds in memory at once, including the intermediate results of GAE."""


@dataclass(frozen=True)
class ExperienceStage(Stage[ExperienceConfig]):
    """Computation of advantages and returns."""

    memory_fix: str = "Lower prompts.per_iteration, generation.k or generation.max_new_tokens, or free memory."

    def libraries(self, config: ExperienceConfig) -> tuple[str, ...]:
        """The library that computes advantages."""
        return ("torch",)

    def answers(self, config: ExperienceConfig, outlook: Outlook) -> AnswerStats | None:
        """The answers of the rollouts: one row per prompt."""
        return outlook.answers_of(config.rollouts)

    def memory(self, config: ExperienceConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """The numbers of all samples, which are in memory at once."""
        answers = self.answers(config, outlook)
        tokens = answers.count * answers.longest_answer if answers else 0
        return (
            Memory({"numbers per token": NUMBERS_PER_TOKEN * 8 * tokens, "process": PROCESS_BYTES}, 1)
            if answers
            else None
        )

    def published_bytes(self, config: ExperienceConfig, outlook: Outlook) -> int | None:
        """prompts · (8 · text + 512) + answers · (256 + max_new_tokens · (7 + 24 · c)); c: numbers per token."""
        answers = self.answers(config, outlook)
        if answers is None:
            return None
        numbers = 2 + (config.reference is not None) + 2 * (config.values is not None)
        each = SAMPLE_BYTES + answers.longest_answer * (ID_BYTES + numbers * LOGPROB_BYTES)
        return answers.prompt_bytes + answers.count * each + STAGE_BYTES


MAKE_EXPERIENCE = ExperienceStage(ExperienceConfig, EXPERIENCE, "training.experience:run")
