"""Declares the stage `policy`, which trains the policy by an algorithm, on pairs or on experience."""

from dataclasses import dataclass

from contracts.declaration import ModelUse
from contracts.outlook import Memory, Outlook
from contracts.records import CHECKPOINT
from training.config import PolicyConfig
from training.estimates import RowShape, training_memory
from training.stages.trainer import (
    Training,
    all_pairs,
    longest_experience,
    longest_pair,
    mean_pair,
    mean_row_of,
    total_pairs,
)


@dataclass(frozen=True)
class PolicyTraining(Training[PolicyConfig]):
    """Training of the policy."""

    def row_count(self, config: PolicyConfig, outlook: Outlook) -> int | None:
        """Number of pairs, or of prompts in the experience."""
        if config.experience is None:
            return total_pairs(all_pairs(config.pairs, outlook))
        answers = outlook.answers_of(config.experience)
        return None if answers is None else answers.prompts.count

    def longest_row(self, config: PolicyConfig, outlook: Outlook) -> RowShape | None:
        """The longest pair, or the longest prompt with all of its answers."""
        if config.experience is None:
            return longest_pair(all_pairs(config.pairs, outlook), config.max_length)
        return longest_experience(outlook.answers_of(config.experience), config.max_length)

    def mean_row(self, config: PolicyConfig, outlook: Outlook) -> RowShape | None:
        """A pair, or a prompt with all of its answers; the prompt has the mean length."""
        if config.experience is None:
            return mean_pair(all_pairs(config.pairs, outlook), config.max_length)
        answers = outlook.answers_of(config.experience)
        return mean_row_of(answers, answers.k if answers else 1, config.max_length)

    def models(self, config: PolicyConfig) -> tuple[ModelUse, ...]:
        """The policy, and the reference model if the algorithm needs one."""
        reference = [ModelUse(config.reference_model)] if config.reference_model is not None else []
        return (*super().models(config), *reference)

    def memory(self, config: PolicyConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Memory of one process, including the reference model."""
        size = outlook.size_of(config.model)
        if size is None:
            return None
        row, has_reference = self.longest_row(config, outlook), config.reference_model is not None
        return training_memory(config, size, row, on_gpu=on_gpu, with_reference=has_reference)

    def row_limit(self, config: PolicyConfig) -> int | None:
        """The config's `max_length`."""
        return config.max_length


POLICY = PolicyTraining(PolicyConfig, CHECKPOINT, "training.policy:run")
