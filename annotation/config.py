"""Configurations of the annotation stages: scores, pairs, evaluation."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from contracts.callables import source_files
from contracts.config import Section, StageConfig, identity, input_path, runtime
from contracts.template import ChatFields, TemplateSettings


class ScorerSettings(TemplateSettings):
    """Settings of one scorer."""

    kind: Literal["reward_model", "pairwise", "rule", "logprobs", "values"] = identity()
    """reward_model: a Bradley-Terry model; pairwise: a pairwise preference model, by whose word each answer has its
    mean probability to be better than others; rule: a Python function; logprobs: a language model's log-probabilities;
    values: a critic's value of the state before each response token."""
    model: Path | None = input_path(None)
    """Directory of the model, for all kinds but rule."""
    function: str | None = identity(None)
    """For the kind rule: package.module:function or file.py:function, called once per completion with the keywords
    messages, response, finish_reason and answer; returns a number, or None where it cannot judge."""
    inputs: list[Path] | None = input_path(None, min_length=1)
    """For the kind rule: files, models or other directories that the function reads beside its own modules. When their
    content changes, the scores are made anew. A function with a keyword `inputs` is given these paths."""
    opponents: int | None = identity(None, ge=1)
    """For the kind pairwise: answers that each is compared with; all others to the same prompt by default, which takes
    K (K - 1) forward passes."""
    dtype: Literal["auto", "float32", "bfloat16"] = identity("auto")
    """Number format of the model; auto: bfloat16 on a GPU, float32 on a CPU."""
    max_length: int | None = identity(None, ge=1)
    """Longer inputs (in tokens) are dropped and counted, never cut; by default the model's context."""
    missing_eos_penalty: float | None = identity(None, ge=0)
    """Subtracted from the score of truncated answers."""
    batch_tokens: int = identity(16384, ge=1)
    """Tokens per forward pass, padding included; batches are made of inputs of similar length."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the completions is dropped."""
    fail_on_error: float = identity(0.0, ge=0, lt=1)
    """Share of the completions whose judgement may fail (an exception of the function, a score that is no finite
    number); they are dropped and counted. 0: the first one stops the stage."""
    seconds_per_sample: float | None = runtime(None, gt=0)
    """For the kind rule: how long the function may take for one completion. One that takes longer is ended, with all
    that it has started, and counts as failed. By default executor.stall_seconds of a run."""
    replicas: int = runtime(1, ge=1)
    """Processes that share the shards, one device each; for the kind rule, processes that share the completions."""


class ScoreConfig(ScorerSettings, ChatFields, StageConfig):
    """Judge every completion with one scorer."""

    stage: ClassVar[str] = "score"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Published rollouts."""
    pairs: Path | None = input_path(None)
    """Published pairs: score only the completions that occur in them."""
    name: str = identity("reward", min_length=1)
    """Name of the scorer, the column that its scores are known by."""
    against: Path | None = input_path(None)
    """For the kind pairwise: published rollouts whose answers to the same prompt each answer is compared with, instead
    of with each other."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "rule" and (self.function is None or self.model is not None):
            raise ValueError("kind=rule needs function=package.module:function, and no model.")
        if self.kind not in ("reward_model", "pairwise") and (self.chat_template_kwargs or self.date):
            raise ValueError(
                f"chat_template_kwargs and date are for models with a chat template; kind={self.kind} uses none."
            )
        if self.kind != "rule" and (self.model is None or self.function is not None):
            raise ValueError(f"kind={self.kind} needs model=DIRECTORY, and no function.")
        if self.kind != "rule" and (self.inputs is not None or self.seconds_per_sample is not None):
            raise ValueError(
                f"inputs and seconds_per_sample are for the function of kind=rule; kind={self.kind} has no function."
            )
        if self.kind not in ("reward_model", "rule") and self.missing_eos_penalty is not None:
            raise ValueError(f"missing_eos_penalty is for rewards; what kind={self.kind} gives has no penalty.")
        if self.kind != "pairwise" and (self.opponents is not None or self.against is not None):
            raise ValueError(f"opponents and against are for kind=pairwise; kind={self.kind} judges answers singly.")
        if self.kind == "pairwise" and self.pairs is not None:
            raise ValueError(
                "kind=pairwise compares all answers to a prompt, not only those in pairs: leave pairs out."
            )
        return self

    def source_files(self) -> dict[str, Path]:
        """The file of the rule's function, and the user's own modules that it imports."""
        return source_files(self.function) if self.function else {}


class PairsSettings(Section):
    """Settings of pair choice."""

    strategy: Literal["max_min", "max_random", "max_max", "all"] = identity("max_min")
    """max_min: best against worst; max_random: best against a random other (seeded); max_max: best against second
    best; all: every pair of completions."""
    length_penalty: float = identity(0.0, ge=0)
    """Subtracted from the score per response token, before anything is chosen."""
    margin: float = identity(0.0, ge=0)
    """Pairs whose scores differ by less are dropped and counted; ties always are."""
    max_dropped: float = identity(0.95, ge=0, le=1)
    """Stop when a larger share of the pairs is dropped."""


class PairsConfig(PairsSettings, StageConfig):
    """Choose preference pairs among the scored completions of each prompt."""

    stage: ClassVar[str] = "pairs"
    code_version: ClassVar[int] = 2

    rollouts: Path = input_path()
    """Published rollouts, with at least two completions per prompt."""
    scores: Path = input_path()
    """Published scores of those rollouts; the score that selects is the score that labels."""
    seed: int = identity(0, ge=0)
    """Seed of the strategy max_random."""


class EvaluationConfig(StageConfig):
    """Judge a policy by its answers to held-out prompts."""

    stage: ClassVar[str] = "evaluation"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Rollouts of the policy on the held-out prompts."""
    scores: dict[str, Path] = input_path()
    """Scores of these rollouts by scorer name; must hold `reward`, and `gold` where a gold scorer exists. Any further
    NAME gives the metric NAME_mean."""
    baseline: Path | None = input_path(None)
    """`reward` scores of the initial policy on the same prompts, for the win rate; None: this is the initial policy."""
    reference: Path | None = input_path(None)
    """Log-probabilities of these rollouts under the initial policy, for the KL; None: this is the initial policy."""
    iteration: int = identity(0, ge=0)
    """Number of the policy: 0 is the initial one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "reward" not in self.scores:
            raise ValueError(f"scores must hold `reward`, found {', '.join(sorted(self.scores)) or 'none'}.")
        for name in self.scores:
            if name in ("reference", "gold_reward") or not name.isidentifier():
                raise ValueError(f"scores.{name}: this name is taken or has other signs than letters, digits and _.")
        return self


class RlhflowExportConfig(StageConfig):
    """Write rollouts as RLHFlow's JSONL: one {"prompt", "responses", "rewards"} a line, in `rlhflow.jsonl`."""

    stage: ClassVar[str] = "rlhflow-export"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Published rollouts."""
    scores: Path | None = input_path(None)
    """Published scores of those rollouts, written as `rewards`; samples without a score are left out and counted."""


class RlhflowImportConfig(StageConfig, ChatFields):
    """Read answers from a file of RLHFlow as rollouts."""

    stage: ClassVar[str] = "rlhflow-import"
    code_version: ClassVar[int] = 2

    source: Path = input_path()
    """JSONL with one {"prompt", "responses"} a line, or JSON {"type": "text_only", "instances": [...]}. A prompt is a
    list of messages, or a string that becomes one user message."""
    tokenizer: Path = input_path()
    """Directory of the model whose chat template and tokens the rollouts get."""
    iteration: int = identity(0, ge=0)
    """Iteration that the rollouts are said to belong to."""
    shard_size: int = identity(1024, ge=1)
    """Prompts per shard."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the samples is dropped."""


class RlhflowScoresConfig(StageConfig):
    """Read the rewards of a file of RLHFlow as scores of the rollouts that were imported from it."""

    stage: ClassVar[str] = "rlhflow-scores"
    code_version: ClassVar[int] = 1

    source: Path = input_path()
    """The file that the rollouts came from; every row must have `rewards`."""
    rollouts: Path = input_path()
    """What `rlhflow-import` published."""
    name: str = identity("reward", min_length=1)
    """Name of the scorer."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the samples is dropped."""


class CheckpointEvaluationSettings(Section):
    """Settings of an evaluation of the user's own."""

    function: str = identity()
    """file.py:function or package.module:function, called as function(checkpoint, output, **settings): directories of
    the model and for its files, both paths. It returns its metrics, numbers by name."""
    settings: dict[str, Any] = identity({})
    """Its further keyword arguments."""
    inputs: list[Path] | None = input_path(None, min_length=1)
    """Files or directories that the function reads beside its own modules, handed to it as the keyword `inputs`. When
    their content changes, the evaluations are made anew."""


class CheckpointEvaluationConfig(CheckpointEvaluationSettings, StageConfig):
    """Evaluate a checkpoint with a function of the user's own."""

    stage: ClassVar[str] = "checkpoint-evaluation"
    code_version: ClassVar[int] = 1

    checkpoint: Path = input_path()
    """Directory of the model."""

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return self.settings if self.inputs is None else {**self.settings, "inputs": self.inputs}

    def source_files(self) -> dict[str, Path]:
        """The file of the function, and the user's own modules that it imports."""
        return source_files(self.function)
