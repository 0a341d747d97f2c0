"""Configurations of the annotation stages, except `score` (annotation/scorers/) and `pairs` (annotation/pairing/)."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import model_validator

from contracts.callables import source_files
from contracts.config import PathText, Section, StageConfig, identity, input_path, runtime
from contracts.template import ChatFields


class EvaluationConfig(StageConfig):
    """Evaluate a policy on its responses to held-out prompts."""

    stage: ClassVar[str] = "evaluation"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Rollouts of the policy on the held-out prompts."""
    scores: dict[str, Path] = input_path()
    """Scores of these rollouts by scorer name; must have `reward`, and `gold` if there is a gold scorer. Any further
    NAME gives the metric NAME_mean."""
    baseline: Path | None = input_path(None)
    """`reward` scores of the initial policy on the same prompts, for the win rate; None: this is the initial policy."""
    reference: Path | None = input_path(None)
    """Log-probabilities of these rollouts under the initial policy, for the KL; None: this is the initial policy."""
    iteration: int = identity(0, ge=0)
    """Number of the policy: 0 is the initial one."""
    diagnostics: bool = identity(False, later=True)
    """Publish intervals of length and stop rate, the diversity of the responses, and the agreement of the scorers too:
    docs/gates.md."""
    ensemble: list[str] = identity([], later=True)
    """Scorers in `scores` that score the same thing: their disagreement is the reward's uncertainty."""
    previous: Path | None = input_path(None)
    """`reward` scores of the policy before this one on the same prompts, for the win rate against that."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "reward" not in self.scores:
            raise ValueError(f"scores must hold `reward`, found {', '.join(sorted(self.scores)) or 'none'}.")
        if missing := [name for name in self.ensemble if name not in self.scores]:
            raise ValueError(
                f"ensemble names {missing[0]!r}, but scores holds only {', '.join(sorted(self.scores))}. Set "
                f"scores.{missing[0]}=SCORES, or take it out of ensemble."
            )
        if len(self.ensemble) == 1:
            raise ValueError(
                f"ensemble names {self.ensemble[0]!r} alone, which cannot disagree with itself. Name two scorers or "
                "more, or leave it out."
            )
        for name in self.scores:
            if name in ("reference", "gold_reward") or not name.isidentifier():
                raise ValueError(
                    f"scores.{name}: this name is taken, or has characters other than letters, digits and _."
                )
        return self


class RlhflowExportConfig(StageConfig):
    """Write rollouts as RLHFlow's JSONL: one {"prompt", "responses", "rewards"} per line, in `rlhflow.jsonl`."""

    stage: ClassVar[str] = "rlhflow-export"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Published rollouts."""
    scores: Path | None = input_path(None)
    """Published scores of those rollouts, written as `rewards`; samples without a score are left out and counted."""


class RlhflowImportConfig(StageConfig, ChatFields):
    """Read answers from an RLHFlow file as rollouts."""

    stage: ClassVar[str] = "rlhflow-import"
    code_version: ClassVar[int] = 2

    source: Path = input_path()
    """JSONL with one {"prompt", "responses"} per line, or JSON {"type": "text_only", "instances": [...]}. A prompt is a
    list of messages, or a string that becomes one user message."""
    tokenizer: Path = input_path()
    """Directory of the model whose chat template and tokenizer are used for the rollouts."""
    answer_column: str | None = identity(None, later=True)
    """Key of each row's known answer, for scorers that use it; RLHFlow's own files have none."""
    iteration: int = identity(0, ge=0)
    """Iteration to record for the rollouts."""
    shard_size: int = identity(1024, ge=1)
    """Prompts per shard."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the samples is dropped."""


class RlhflowScoresConfig(StageConfig):
    """Read the rewards in an RLHFlow file as scores of the rollouts that were imported from it."""

    stage: ClassVar[str] = "rlhflow-scores"
    code_version: ClassVar[int] = 1

    source: Path = input_path()
    """The file that the rollouts came from; every row must have `rewards`."""
    rollouts: Path = input_path()
    """Rollouts that `rlhflow-import` published."""
    name: str = identity("reward", min_length=1)
    """Name of the scorer."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the samples is dropped."""


class CheckpointEvaluationSettings(Section):
    """Settings of your own evaluation."""

    function: PathText = identity()
    """file.py:function or package.module:function, called as function(checkpoint, output, **settings) with two paths:
    the model's directory, and a directory for files of its own. It returns its metrics, numbers by name."""
    settings: dict[str, Any] = identity({})
    """Further keyword arguments of the function."""
    inputs: list[Path] | None = input_path(None, min_length=1)
    """Files or directories that the function reads in addition to its own modules, passed as the keyword `inputs`. When
    their content changes, the evaluations run again."""


class CheckpointEvaluationConfig(CheckpointEvaluationSettings, StageConfig):
    """Evaluate a checkpoint with your own function."""

    stage: ClassVar[str] = "checkpoint-evaluation"
    code_version: ClassVar[int] = 1

    checkpoint: Path = input_path()
    """Directory of the model."""
    needed: list[str] = runtime([])
    """Metrics that the function must return, because gates use them."""

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return self.settings if self.inputs is None else {**self.settings, "inputs": self.inputs}

    def source_files(self) -> dict[str, Path]:
        """The file of the function, and the user's own modules that it imports."""
        return source_files(self.function)
