"""Configurations of the training stages."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from contracts.config import StageConfig, identity, input_path, runtime


class TrainingConfig(StageConfig):
    """What every algorithm shares: optimizer, schedule, batching, launch."""

    model: Path = input_path()
    """Directory of the model to start from."""
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
    """sgd (no momentum) is for comparisons between parallel layouts."""
    weight_decay: float = identity(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = identity(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = identity(0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    max_grad_norm: float = identity(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    seed: int = identity(0, ge=0)
    """Decides the order of the data and every initial value."""
    dtype: Literal["auto", "float32", "bfloat16"] = identity("auto")
    """Number format of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU."""
    max_length: int | None = identity(None, ge=1)
    """Longer sequences are dropped and counted, never cut; by default the model's context."""
    frozen: list[str] = identity([])
    """Parameters whose name contains one of these are not trained, for example embed_tokens."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the rows is dropped."""
    micro_batch_tokens: int = runtime(16384, ge=1)
    """Tokens per forward and backward pass of one process, padding included."""
    gradient_checkpointing: bool = runtime(False)
    """Recompute activations in the backward pass: less memory, more time."""
    processes: int = runtime(1, ge=1)
    """Processes on this machine, one device each, started by `accelerate launch`."""
    accelerate_config: Path | None = runtime(None)
    """File for `accelerate launch`, for example configs/accelerate/zero3.yaml; None: plain data parallel."""
    checkpoint_seconds: float = runtime(300.0, ge=0)
    """Save the state of the training at least this often, to go on from after a kill; 0: after every step."""


class SftConfig(TrainingConfig):
    """Supervised fine-tuning: imitate the answers of demonstrations."""

    stage: ClassVar[str] = "sft"
    code_version: ClassVar[int] = 1

    demonstrations: Path = input_path()
    """JSONL file of conversations (`messages`) that end with the assistant's answer."""


class RewardConfig(TrainingConfig):
    """Train a Bradley-Terry reward model on pairs (loss: -log sigmoid(r_chosen - r_rejected))."""

    stage: ClassVar[str] = "reward"
    code_version: ClassVar[int] = 1

    pairs: list[Path] = input_path(min_length=1)
    """Published pairs."""
    eval_fraction: float = identity(0.1, ge=0, lt=1)
    """Share of the prompts whose pairs are held out to measure the accuracy."""


class DpoConfig(TrainingConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    stage: ClassVar[str] = "dpo"
    code_version: ClassVar[int] = 1

    pairs: list[Path] = input_path(min_length=1)
    """Published pairs, of this iteration and of as many earlier ones as wanted."""
    reference: list[Path] = input_path(min_length=1)
    """Published reference log-probabilities (scores of the kind logprobs), one for each of `pairs`."""
    beta: float = identity(0.1, gt=0)
    """Strength of the pull towards the reference."""
    loss: Literal["sigmoid", "hinge", "ipo"] = identity("sigmoid")
    """sigmoid: DPO; hinge: SLiC (arXiv 2305.10425); ipo: IPO (arXiv 2310.12036)."""
    label_smoothing: float = identity(0.0, ge=0, lt=0.5)
    """Probability that a label is flipped (conservative DPO), for the sigmoid loss."""
    nll_coefficient: float = identity(0.0, ge=0)
    """Weight of the chosen answers' mean token NLL that is added to the loss (RPO, arXiv 2404.19733)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.pairs) != len(self.reference):
            raise ValueError(
                f"{len(self.pairs)} pairs but {len(self.reference)} reference: give one reference for each of pairs."
            )
        return self


class EmaConfig(StageConfig):
    """Move an average of weights towards a model: average ← decay · average + (1 - decay) · model."""

    stage: ClassVar[str] = "ema"
    code_version: ClassVar[int] = 1

    average: Path = input_path()
    """Directory of the average so far."""
    model: Path = input_path()
    """Directory of the model that enters it."""
    decay: float = identity(0.9, ge=0, lt=1)
    """Share of the old average that is kept."""
