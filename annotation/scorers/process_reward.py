"""The scorer kind `process_reward`: a process reward model, which scores each step of an answer after the step."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from annotation.scorers.base import ChatScoreConfig, RewardScorerSettings
from annotation.scorers.pooling import PooledSettings
from contracts.artifacts import Artifact
from contracts.config import identity, input_path
from contracts.declaration import load
from contracts.errors import UserError
from contracts.models import ModelInfo
from contracts.preflight import Finding, Inspected

if TYPE_CHECKING:
    from modeling.loading import LoadedAs

UNREAD_STEPS = "unread_steps"
"""Reason in the drop ledger: the model's chat template leaves out some of the answer's steps."""
UNPLACED_STEPS = "unplaced_steps"
"""Reason in the drop ledger: for one of the steps, no token of the policy could be found that ends it."""


def _require_steps(model: ModelInfo) -> None:
    if not model.classifies_tokens:
        if not model.architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
            raise UserError(
                f"{model.path} is a {model.architecture}; kind=process_reward reads a classifier of tokens "
                "(…ForTokenClassification) with two labels, or a causal language model (…ForCausalLM)."
                + (" For one of whole answers set kind=reward_model." if model.labels is not None else "")
            )
        model.require_causal()
    elif model.labels != 2:
        raise UserError(
            f"{model.path} is a {model.architecture} with {model.labels} labels; a process reward model has two, "
            "for wrong and right steps (num_labels=2)."
        )


class ProcessRewardSettings(RewardScorerSettings, PooledSettings):
    """Settings of a process reward model."""

    kind: Literal["process_reward"] = identity()
    """A process reward model: a token classifier with two labels, or a language model that says whether a step is
    right."""
    separator: str = identity("\n\n", min_length=1)
    """The separator between two steps of a response."""
    separator_pattern: str | None = identity(None, min_length=1)
    """A regular expression (Python's) instead of the separator."""
    keep_separators: bool = identity(default=False)
    """Whether the model reads the separators, after the marker."""
    layout: Literal["marker", "turns"] = identity("marker")
    """How the model reads steps: one turn with the marker after each step, or each step as a user turn with `good` as
    the reply."""
    marker: str | None = identity(None, min_length=1)
    """For layout=marker: the token after a step at which the model was trained to score it, for example <extra_0>."""
    good: str = identity("+", min_length=1)
    """For a language model: the token for a correct step."""
    bad: str = identity("-", min_length=1)
    """For a language model: the token for a wrong step."""
    aggregate: Literal["min", "product", "mean", "last", "sum"] = identity("min")
    """How the score of a response is computed from the probabilities that its steps are right."""
    differences: bool = identity(default=False)
    """Reward a step's last token with the change of the probability from the previous step, instead of with the
    probability itself."""
    tokenizer: Path | None = input_path(None)
    """Directory of the policy's tokenizer, to locate the last tokens of steps. In a run it is the policy's; by default
    the model's own, if the policy has the same."""

    reader: ClassVar[str] = "annotation.models.pooled:open_process_reward"
    pooled_as: ClassVar[str] = "a process reward model"
    checks: ClassVar[tuple[Callable[[ModelInfo], None], ...]] = (_require_steps, ModelInfo.require_chat_template)
    keyed_with_legacy_fields: ClassVar[bool] = False
    rewards_tokens: ClassVar[bool] = True
    can_reward_tokens: ClassVar[bool] = True
    locates_tokens: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if (self.layout == "marker") != (self.marker is not None):
            raise ValueError(
                "layout=marker, and only it, needs marker=TOKEN, at which the model was trained to score a step: "
                "<extra_0> for Qwen2.5-Math-PRM; docs/scorers.md has others."
            )
        try:
            pattern = self.pattern
        except re.error as error:
            raise ValueError(f"separator_pattern is not a regular expression: {error}.") from error
        if pattern.search("") is not None:
            raise ValueError(f"separator_pattern={pattern.pattern!r} matches the empty string. Use + instead of *.")
        return self

    @property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression that separates steps."""
        return re.compile(re.escape(self.separator) if self.separator_pattern is None else self.separator_pattern)

    def loaded_as(self) -> "LoadedAs":
        """The class of model to load, as its checkpoint says."""
        assert self.model is not None
        return "token classifier" if ModelInfo.read(self.model).classifies_tokens else "causal"

    def check(self) -> None:
        """Check that the model is of a supported type, and fits the layout."""
        super().check()
        if self.layout == "turns" and self.loaded_as() == "token classifier":
            raise UserError(
                f"layout=turns reads the replies of a language model, but {self.model} is a classifier of tokens. Set "
                "layout=marker and marker=TOKEN."
            )

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check the model, and that the marker and the labels are single tokens."""
        yield from super().preflight(stage)
        if self.model is not None and (self.model / "config.json").is_file():
            self.check()
            yield load("annotation.models.steps:tokens_found")(self)

    def facts_of(self, rollouts: Artifact) -> dict[str, str]:
        """The vocabulary of the policy's tokens, which the rewards are assigned to.

        Raises:
            UserError: the tokenizer has another vocabulary.
        """
        from contracts.chat import ChatTokenizer

        policy = rollouts.manifest.facts.get("vocabulary")
        assert self.model is not None
        found = ChatTokenizer(self.tokenizer or self.model).vocabulary
        if policy is not None and found != policy:
            raise UserError(
                f"{self.tokenizer or self.model} has another vocabulary ({found[:12]}) than the policy that sampled "
                f"{rollouts.path} ({policy[:12]}), so that the last tokens of steps cannot be found. Set "
                "tokenizer=DIRECTORY of the policy."
            )
        return {"vocabulary": found}

    def fixes(self, unread: str) -> dict[str, str]:
        """Advice about dropped samples, by reason, including the reasons about steps."""
        return super().fixes(unread) | {
            UNREAD_STEPS: f"The chat template of {self.model} leaves out steps, as some do with reasoning. Use another "
            "template (chat_template.jinja),",
            UNPLACED_STEPS: "The texts of the answers are not what the tokenizer makes of their tokens. Set "
            "tokenizer=DIRECTORY of the policy that sampled them,",
        }


class ProcessRewardConfig(ProcessRewardSettings, ChatScoreConfig):
    """Score every step of every completion with a process reward model."""
