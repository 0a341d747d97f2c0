"""Configs of the training stages."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from contracts.config import PathText, Section, StageConfig, identity, input_path, runtime
from contracts.template import ChatFields
from training.parallel import ParallelConfig
from training.registry import BUILT_IN, Description, Level, check_settings, describe


class LoraSection(Section):
    """Train low-rank adapters instead of the weights (LoRA, arXiv 2106.09685); they are merged into the checkpoint."""

    rank: int = identity(16, ge=1)
    """Rank of the adapters."""
    alpha: float = identity(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: list[str] = identity(["all-linear"], min_length=1)
    """Names of the linear layers that get adapters, for example q_proj; all-linear: all but the LM head."""


class CorrectionSection(Section):
    """Importance correction: weight each answer's advantages by its probability under the policy, divided by that under
    the policy that sampled it. `training.correction` has the formulas."""

    level: Level = identity("token")
    """The level of the weights: token, each token; sequence, each response (the product of its tokens' weights);
    geometric, each response (their geometric mean)."""
    treatment: Literal["truncate", "mask"] = identity("truncate")
    """Treatment of weights outside the bounds: truncate, they are clipped; mask, they are set to 0."""
    high: float = identity(2.0, gt=1)
    """Upper bound of the weights."""
    low: float = identity(0.0, ge=0, lt=1)
    """Lower bound of the weights."""


class TrainingSettings(Section):
    """Settings of any training: optimizer, schedule, batching, launch."""

    epochs: int = identity(1, ge=1)
    """Passes over the data."""
    max_steps: int | None = identity(None, ge=1)
    """Stop after this many optimizer steps; the schedule ends there as well."""
    global_batch: int = identity(128, ge=1)
    """Rows (pairs, demonstrations) per optimizer step, over all processes; gradient accumulation is derived."""
    learning_rate: float = identity(5e-7, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = identity("cosine")
    """Shape of the learning rate after the warm-up; cosine and linear end at zero."""
    warmup_ratio: float = identity(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    optimizer: Literal["adamw", "sgd"] = identity("adamw")
    """The optimizer; sgd (without momentum) is meant for comparing parallel layouts."""
    weight_decay: float = identity(0.0, ge=0, le=1)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = identity(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = identity(0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    max_grad_norm: float = identity(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    dtype: Literal["auto", "float32", "bfloat16"] = identity("auto")
    """Number format of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU."""
    max_length: int | None = identity(None, ge=2)
    """Longer sequences are dropped and counted, never truncated; by default the model's context."""
    frozen: list[str] = identity([])
    """Parameters whose name contains one of these are not trained, for example embed_tokens."""
    lora: LoraSection | None = identity(None)
    """Train LoRA adapters instead of the weights: {rank: 16, alpha: 32}. The base weights stay in `dtype`, without fp32
    copies."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the rows is dropped."""
    micro_batch_tokens: int = runtime(16384, ge=1)
    """Tokens per forward and backward pass of one process, padding included."""
    packing: Literal["auto", "shared", "flat", "padded"] = runtime("auto")
    """shared: batches without padding, in which the prompt of several responses is computed once; flat: without
    sharing; padded: for models that support neither; auto: the first of these that the model supports."""
    gradient_checkpointing: bool = runtime(False)
    """Recompute activations in the backward pass: less memory, more time."""
    parallel: ParallelConfig = runtime(ParallelConfig())
    """Parallel layout: processes and how the model is distributed over them, for example {dp: 4, zero: 3}."""
    profile_steps: list[Annotated[int, Field(ge=1)]] = runtime([])
    """Optimizer steps, counted from 1, for which every rank writes a torch profiler trace, for example [3, 4]:
    docs/hooks.md. Steps that a resumed training skips are not traced."""
    checkpoint_seconds: float = runtime(300.0, ge=0)
    """Seconds between saves of the training state, to resume from after a kill; 0: after every step."""

    @model_validator(mode="after")
    def _check_rate(self) -> Self:
        if self.optimizer == "adamw" and self.learning_rate > 1:
            raise ValueError(
                f"learning_rate is {self.learning_rate:g}: AdamW changes every weight by about that much per step, so "
                "no model survives more than 1. Usual values are 1e-7 to 1e-5 for preferences, up to 1e-3 otherwise."
            )
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.packing == "padded" and self.parallel.sp > 1:
            raise ValueError(
                f"packing=padded with parallel.sp={self.parallel.sp}: sp divides flat batches. Set sp to 1."
            )
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.lora is not None and self.frozen:
            raise ValueError("frozen is for training the weights themselves; with lora only adapters are trained.")
        if self.lora is not None and self.parallel.tp > 1:
            raise ValueError(f"lora with parallel.tp={self.parallel.tp}: adapters are not sharded. Set tp to 1.")
        return self


class TrainingConfig(TrainingSettings, StageConfig):
    """Config fields that all training stages share: the settings, the initial model and the seed."""

    model: Path = input_path()
    """Directory of the model to start from."""
    seed: int = identity(0, ge=0)
    """Seed of the data order and of every initialization."""


class SftSettings(TrainingSettings):
    """Settings of supervised fine-tuning."""

    demonstrations: Path = input_path()
    """Conversations that end with the assistant's response, or prompts with their responses in separate columns: a
    file, a directory or a data set in any format that the prompts stage reads (docs/stages.md). Of a data set with
    several splits, `train` is used."""


class SftConfig(SftSettings, TrainingConfig, ChatFields):
    """Supervised fine-tuning: imitate the answers of demonstrations."""

    stage: ClassVar[str] = "sft"
    code_version: ClassVar[int] = 3


class RewardSettings(TrainingSettings):
    """Settings of reward model training."""

    kind: Literal["bradley_terry", "pairwise"] = identity("bradley_terry")
    """bradley_terry: a sequence classifier that scores one response; pairwise: a causal language model that reads two
    and says which is better."""
    eval_fraction: float = identity(0.1, ge=0, lt=1)
    """Share of the prompts whose pairs are held out to measure the accuracy."""


class RewardConfig(RewardSettings, TrainingConfig, ChatFields):
    """Train a reward model on pairs (loss: -log sigmoid(r_chosen - r_rejected))."""

    stage: ClassVar[str] = "reward"
    code_version: ClassVar[int] = 4

    pairs: list[Path] = input_path(min_length=1)
    """Published pairs."""


class PolicySettings(TrainingSettings):
    """Settings of policy training."""

    algorithm: PathText = identity("dpo")
    """A name (dpo, ipo, simpo, kto, ppo, grpo, rloo, ...; docs/algorithms.md has all), your own file (mine.py), or
    package.module."""
    settings: dict[str, Any] = identity({})
    """The algorithm's own settings, for example {beta: 0.1}."""
    nll_coefficient: float = identity(0.0, ge=0)
    """Weight of the chosen responses' mean token NLL that is added to the loss of an algorithm that reads pairs."""
    correction: CorrectionSection | None = identity(None, later=True)
    """Importance correction for off-policy samples (of an older policy, with `lag`), for algorithms that read samples:
    {level: token, treatment: truncate, high: 2}."""
    inputs: list[Path] | None = input_path(None, min_length=1)
    """For your own algorithm: files or directories that it reads in addition to its modules. When their content
    changes, the training runs again."""
    value_head: bool = identity(False)
    """Train a value head on the policy's own last hidden states, so that it is its own critic (a shared backbone), for
    algorithms that need values."""
    max_drift: float = runtime(0.1, gt=0)
    """Stop when the log-probabilities of the engine that sampled differ from the trainer's by more than this (nats per
    token, mean of the absolute differences)."""


class PolicyConfig(PolicySettings, TrainingConfig):
    """Train the policy by a named algorithm, on preference pairs or on scored samples."""

    stage: ClassVar[str] = "policy"
    code_version: ClassVar[int] = 2

    pairs: list[Path] = input_path([])
    """Published pairs, of this iteration and of any earlier ones, for algorithms that read pairs."""
    reference: list[Path] = input_path([])
    """Published reference log-probabilities (scores of the kind logprobs), one for each of `pairs`, for algorithms that
    need them."""
    experience: Path | None = input_path(None)
    """Published experience, for algorithms that read samples."""
    reference_model: Path | None = input_path(None)
    """Directory of the reference policy, which is loaded together with the policy, for algorithms that compare full
    distributions."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        description = describe(self.algorithm)
        # Including all defaults, so that the stage key has the values that are used.
        object.__setattr__(self, "settings", check_settings(description, self.settings))
        _check_inputs(self.algorithm, self.inputs)
        require_correctable(description, self)
        self._check_reference_model("reference_model" in description.needs)
        if description.reads == "pairs":
            expected = len(self.pairs) if "reference" in description.needs else 0
            if not self.pairs or self.experience is not None:
                raise ValueError(f"algorithm={self.algorithm} reads pairs: set pairs=[PATH, ...], and no experience.")
            if self.value_head:
                raise ValueError(f"value_head: algorithm={self.algorithm} reads pairs, which have no values.")
            if self.max_drift != type(self).model_fields["max_drift"].default:
                raise ValueError(f"max_drift is for samples; algorithm={self.algorithm} reads pairs. Leave it out.")
            if len(self.reference) != expected:
                raise ValueError(
                    f"algorithm={self.algorithm} with {len(self.pairs)} pairs needs {expected} reference, found "
                    f"{len(self.reference)}."
                )
        else:
            if self.pairs or self.reference or self.experience is None:
                raise ValueError(
                    f"algorithm={self.algorithm} reads samples: set experience=PATH, and neither pairs nor reference."
                )
            if self.value_head and "values" not in description.needs:
                raise ValueError(f"value_head: algorithm={self.algorithm} needs no values.")
            if self.nll_coefficient:
                raise ValueError(
                    f"nll_coefficient is for pairs; algorithm={self.algorithm} reads samples. Set nll_coefficient=0."
                )
        return self

    def _check_reference_model(self, needed: bool) -> None:
        if needed != (self.reference_model is not None):
            fix = "set reference_model=DIRECTORY" if needed else "leave reference_model out"
            raise ValueError(f"algorithm={self.algorithm} needs {'a' if needed else 'no'} reference model: {fix}.")
        require_whole_model(self.algorithm, needed, self.parallel)

    def source_files(self) -> dict[str, Path]:
        """Source files of the user's own algorithm and of its imports; built-in algorithms count by `code_version`."""
        return {} if self.algorithm in BUILT_IN else describe(self.algorithm).sources


def require_whole_model(algorithm: str, needed: bool, parallel: ParallelConfig) -> None:
    """Check that every process holds the whole policy if the algorithm needs a reference model.

    Raises:
        ValueError: the layout divides the policy.
    """
    if needed and (parallel.is_native or parallel.zero == 3):
        raise ValueError(
            f"algorithm={algorithm} needs a reference model, for which every process must hold the whole policy, but "
            f"parallel ({parallel}) divides the policy. Set zero to at most 2, and tp, pp and sp to 1."
        )


def require_correctable(description: Description, settings: PolicySettings) -> None:
    """Check that the algorithm supports the configured importance correction.

    Raises:
        ValueError: it does not, or it corrects on its own.
    """
    if settings.correction is None:
        return
    name, level = description.algorithm, settings.correction.level
    if not description.corrections:
        why = "it learns from answers of older policies without one"
        if not description.off_policy:
            why = "its loss takes no advantages, which a correction weights"
        raise ValueError(f"correction is not for algorithm={name}: {why}. Leave it out.")
    if level not in description.corrections:
        raise ValueError(
            f"correction.level is {level}, but algorithm={name} weights whole answers, not tokens. Set it to "
            f"{' or '.join(description.corrections)}."
        )
    if cap := settings.settings.get("importance_cap"):
        raise ValueError(
            f"settings.importance_cap is {cap!r} in addition to a correction: both are the same ratio. Set "
            "importance_cap=0, or leave correction out."
        )


def _check_inputs(algorithm: str, inputs: list[Path] | None) -> None:
    if inputs is not None and algorithm in BUILT_IN:
        raise ValueError(
            f"inputs is for files that your own algorithm reads; algorithm={algorithm} reads none. Leave it out."
        )


class CriticSettings(TrainingSettings):
    """Settings of critic training."""

    learning_rate: float = identity(9e-6, gt=0)
    """Peak learning rate; use several times the policy's (OpenRLHF's default)."""
    clip: float = identity(0.2, gt=0)
    """Value clipping: the new value is at most this far from the old one in the clipped term (arXiv 1707.06347, as in
    baselines). It is in units of the reward: raise it for rewards with a large spread."""


class CriticConfig(CriticSettings, TrainingConfig):
    """Train the critic of PPO on the returns of an experience (clipped value loss)."""

    stage: ClassVar[str] = "critic"
    code_version: ClassVar[int] = 2

    experience: Path = input_path()
    """Published experience of an algorithm that needs values."""


class ValueHeadConfig(StageConfig):
    """Create an untrained critic: a model's weights with a value head of zeros."""

    stage: ClassVar[str] = "value-head"
    code_version: ClassVar[int] = 1

    model: Path = input_path()
    """Directory of the causal language model that the critic starts from."""


class MergeConfig(StageConfig):
    """Merge a PEFT adapter into its model; the result can be a policy or a reward model."""

    stage: ClassVar[str] = "merge"
    code_version: ClassVar[int] = 1

    model: Path = input_path()
    """Directory of the model that the adapter was trained on."""
    adapter: Path = input_path()
    """Directory with adapter_config.json and adapter_model.safetensors."""


class EmaConfig(StageConfig):
    """Move an average of weights towards a model: average ← decay · average + (1 - decay) · model."""

    stage: ClassVar[str] = "ema"
    code_version: ClassVar[int] = 2

    average: Path = input_path()
    """Directory of the current average."""
    model: Path = input_path()
    """Directory of the model to add."""
    decay: float = identity(0.9, ge=0, lt=1)
    """Share of the old average that is kept."""


class ExperienceSettings(Section):
    """Settings of the experience stage: the KL penalty."""

    kl_coefficient: float | None = identity(None, ge=0)
    """Weight of the penalty on the KL divergence from the reference, for algorithms that add it to the reward; 0.05 by
    default. With kl_target it is the initial weight."""
    kl_target: float | None = identity(None, gt=0)
    """KL divergence (nats per response) that the coefficient is adapted to (arXiv 1909.08593, section 2.2); by default
    it is fixed."""
    kl_horizon: float = identity(10000.0, gt=0)
    """Responses until an adaptive coefficient is fully adapted; with more per iteration it adapts at once."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the samples is dropped; those that the algorithm itself leaves out do not count."""


class ExperienceConfig(ExperienceSettings, StageConfig):
    """Turn scored samples into what an algorithm trains on: rewards per token, advantages, returns."""

    stage: ClassVar[str] = "experience"
    code_version: ClassVar[int] = 1

    algorithm: PathText = identity()
    """The same as for the policy's training: a name (ppo, grpo, rloo, ...), your own file (mine.py), or
    package.module."""
    settings: dict[str, Any] = identity({})
    """The algorithm's own settings, the same as for the policy's training; those of its loss have no effect here."""
    rollouts: Path = input_path()
    """Published rollouts, sampled from the policy's own distribution (temperature 1, no top_p or top_k), with its
    log-probabilities."""
    rewards: Path = input_path()
    """Published scores of those rollouts."""
    reference: Path | None = input_path(None)
    """Log-probabilities of those rollouts under the reference policy (scores of the kind logprobs), if needed."""
    values: Path | None = input_path(None)
    """The critic's values of those rollouts (scores of the kind values), if needed."""
    greedy: Path | None = input_path(None)
    """Scores of `greedy_rollouts` by the scorer of `rewards`, if needed."""
    greedy_rollouts: Path | None = input_path(None)
    """Published greedy responses of the same policy to the same prompts, at temperature 0, if needed."""
    previous: Path | None = input_path(None)
    """The experience of the previous iteration, from which an adaptive coefficient continues."""
    inputs: list[Path] | None = input_path(None, min_length=1)
    """The same as for the policy's training: files that your own algorithm reads in addition to its modules."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        description = describe(self.algorithm)
        settings = check_settings(description, self.settings)
        if description.reads != "samples":
            raise ValueError(f"algorithm={self.algorithm} reads pairs, not samples, and needs no experience.")
        # Including all defaults, but without the settings of the loss, which this stage does not use.
        object.__setattr__(self, "settings", description.arguments("advantages", settings))
        _check_inputs(self.algorithm, self.inputs)
        for name, need in (
            ("reference", "reference"), ("values", "values"), ("greedy", "greedy"), ("greedy_rollouts", "greedy")
        ):  # fmt: skip
            given = getattr(self, name) is not None
            if need in description.needs and not given:
                raise ValueError(f"algorithm={self.algorithm} needs {need}: set {name}=PATH.")
            if given and need not in description.needs:
                raise ValueError(f"algorithm={self.algorithm} needs no {need}: leave {name} out.")
        if "reference" not in description.needs and (self.kl_target is not None or self.kl_coefficient is not None):
            raise ValueError(
                f"algorithm={self.algorithm} needs no reference, so there is no KL divergence from it: leave "
                "kl_coefficient and kl_target out."
            )
        if not description.penalises_divergence and (self.kl_target is not None or self.kl_coefficient):
            raise ValueError(
                f"algorithm={self.algorithm} puts no KL penalty into the reward, so kl_coefficient and kl_target would "
                "change nothing: leave them out. Its own settings may have a weight for the divergence."
            )
        if self.kl_target is None and self.previous is not None:
            raise ValueError("previous is for an adaptive coefficient: set kl_target, or leave previous out.")
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target adapts kl_coefficient by factors, so it must not begin at 0.")
        return self

    def source_files(self) -> dict[str, Path]:
        """Source files of the user's own algorithm and of its imports; built-in algorithms count by `code_version`."""
        return {} if self.algorithm in BUILT_IN else describe(self.algorithm).sources
