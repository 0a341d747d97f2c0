"""Base class of the declarations of all training stages."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from contracts.config import validate
from contracts.declaration import ModelUse, ProcessLayout, Stage, Workload
from contracts.models import ModelInfo
from contracts.operations import ModelLayout, Operations, shape_of
from contracts.outlook import STAGE_BYTES, AnswerStats, Memory, Outlook, PairStats
from training.config import TrainingConfig
from training.estimates import RowShape, bytes_per_number, longest_row_of, trained_parameters, training_memory
from training.parallel import ParallelConfig, check_layout

T = TypeVar("T", bound=TrainingConfig)

PARALLEL_KEYS = ("dp", "tp", "pp", "sp", "zero", "offload")
OTHER_KEYS = ("micro_batch_tokens", "gradient_checkpointing")
"""Layout keys outside of the section `parallel`."""
LOG_LINE_BYTES = 512
"""Bytes of an optimizer step's line in the training log."""


@dataclass(frozen=True)
class Training(Stage[T]):
    """A stage that trains a model. Subclasses describe its rows: `row_count`, `longest_row` and `mean_row`."""

    launch: str | None = "training.launch:launch"
    is_worker_node: str | None = "training.launch:is_worker_node"
    preflight: str | None = "training.preflight:check_training"
    step_log: str = "training-log.jsonl"
    layout_keys: tuple[str, ...] = (*PARALLEL_KEYS, *OTHER_KEYS)
    memory_fix: str = (
        "Lower micro_batch_tokens, set gradient_checkpointing=true, or spread the training over more devices with "
        "parallel.dp=N parallel.zero=3 (each with its section's name in front)."
    )

    def row_count(self, config: T, outlook: Outlook) -> int | None:
        """Number of rows in an epoch; None if unknown."""
        raise NotImplementedError

    def longest_row(self, config: T, outlook: Outlook) -> RowShape | None:
        """The largest row that may occur; None if unknown."""
        raise NotImplementedError

    def mean_row(self, config: T, outlook: Outlook) -> RowShape | None:
        """A typical row: a prompt of mean length, and answers as long as allowed; None if unknown."""
        raise NotImplementedError

    def models(self, config: T) -> tuple[ModelUse, ...]:
        """The initial model."""
        start = ModelInfo.require_classifier_start if self.has_score_head(config) else ModelInfo.require_causal
        fits = functools.partial(_require_length, tokens=config.max_length or 1)
        checks: tuple[Callable[[ModelInfo], None], ...] = (start, *self.reads_as(config), fits)
        return (ModelUse(config.model, checks, functools.partial(check_layout, config.parallel)),)

    def reads_as(self, config: T) -> tuple[Callable[[ModelInfo], None], ...]:
        """Further requirements on the model, depending on how the stage presents its data."""
        return ()

    def libraries(self, config: T) -> tuple[str, ...]:
        """Libraries of the model and of its launcher."""
        deepspeed = ["deepspeed"] if config.parallel.deepspeed_stage else []
        return ("torch", "transformers", "accelerate", *deepspeed)

    def memory(self, config: T, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Memory of one process."""
        size = outlook.size_of(config.model)
        if size is None:
            return None
        size = size.as_classifier() if self.has_score_head(config) else size
        return training_memory(config, size, self.longest_row(config, outlook), on_gpu=on_gpu)

    def operations(self, config: T, outlook: Outlook, *, on_gpu: bool) -> Operations | None:
        """Forward and backward passes over typical rows, in steps of a global batch."""
        size, row = outlook.size_of(config.model), self.mean_row(config, outlook)
        rows, steps = self.row_count(config, outlook), self.steps(config, outlook)
        if size is None or row is None or rows is None or steps is None:
            return None
        size = size.as_classifier() if self.has_score_head(config) else size
        rows = min(rows, steps * config.global_batch)
        shared = config.packing in ("auto", "shared")
        prompts = rows * row.prompt * (1 if shared else row.sequences)
        answers = rows * row.sequences * row.answer
        parallel = config.parallel
        return Operations(
            kind="training",
            model=shape_of(size),
            number=bytes_per_number(config, on_gpu),
            layout=ModelLayout(
                *(parallel.dp, parallel.tp, parallel.pp, parallel.sp, parallel.zero),
                offload=tuple(sorted(parallel.offload)),
                nodes=parallel.nodes,
            ),
            sequences=rows * row.sequences,
            prompt_tokens=prompts,
            answer_tokens=answers,
            length=row.prompt + row.answer,
            logits=0 if size.classifier else answers,
            batch=config.micro_batch_tokens,
            passes=max(1, round(steps * config.global_batch / max(1, rows))),
            steps=steps,
            trained=trained_parameters(config, size),
            recomputes=config.gradient_checkpointing,
            forward_models=len(self.models(config)) - 1,
        )

    def published_bytes(self, config: T, outlook: Outlook) -> int | None:
        """Four bytes per parameter (bf16: 2, and 2 for the remainders to fp32), the tokenizer, and the training log."""
        size = outlook.size_of(config.output)
        steps = self.steps(config, outlook) or 0
        return None if size is None else size.checkpoint_bytes(4) + LOG_LINE_BYTES * steps + STAGE_BYTES

    def scratch_bytes(self, config: T, outlook: Outlook) -> int:
        """The training state: T trained parameters and AdamW's two moments in fp32 (12 T; 4 T for SGD). Twice that
        while it is saved, because the new file replaces the old one only when it is complete."""
        size = outlook.size_of(config.output)
        return 2 * (12 if config.optimizer == "adamw" else 4) * trained_parameters(config, size) if size else 0

    def steps(self, config: T, outlook: Outlook) -> int | None:
        """Maximum number of optimizer steps; None if unknown."""
        if config.max_steps is not None:
            return config.max_steps
        rows = self.row_count(config, outlook)
        return None if rows is None else config.epochs * -(-rows // config.global_batch)

    def workload(self, config: T) -> Workload:
        """Training: one job."""
        return "training"

    def layout(self, config: T) -> ProcessLayout:
        """The layout of the section `parallel`."""
        parallel = config.parallel
        network_keys = f"parallel: {parallel}" if parallel.processes > 1 or parallel.deepspeed_stage else ""
        fixed = "nodes" in parallel.model_fields_set
        return ProcessLayout(parallel.processes, parallel.nodes, fixed, str(parallel), parallel.processes, network_keys)

    def spread(self, config: T, devices: int, nodes: int | None = None) -> T:
        """The config with data parallelism over the devices that tp, pp and sp leave, unless it sets `dp`."""
        parallel = config.parallel
        update = {} if nodes is None else {"nodes": nodes}
        dp = devices // (parallel.tp * parallel.pp * parallel.sp)
        if dp > 1 and "dp" not in parallel.model_fields_set:
            update["dp"] = dp
        return config.model_copy(update={"parallel": parallel.model_copy(update=update)}) if update else config

    def with_layout(self, config: T, sizes: Mapping[str, Any]) -> T:
        """The config with these sizes, in the section `parallel` or outside of it, validated like any config."""
        parallel = config.parallel.model_dump(exclude_unset=True)
        parallel |= {key: size for key, size in sizes.items() if key in PARALLEL_KEYS}
        own = {key: size for key, size in sizes.items() if key in OTHER_KEYS}
        validate(ParallelConfig, parallel, "layout")  # so that errors name the layout's keys
        return validate(type(config), config.model_dump(exclude_unset=True) | own | {"parallel": parallel}, "layout")

    def origin(self, config: T) -> Path | None:
        """The initial model."""
        return config.model


def _require_length(model: ModelInfo, tokens: int) -> None:
    model.require_length(tokens, "max_length")


def all_pairs(paths: list[Path], outlook: Outlook) -> list[PairStats | None]:
    """Estimates of the pairs at each path; None for those that are unknown."""
    return [outlook.pairs_of(path) for path in paths]


def total_pairs(pairs: list[PairStats | None]) -> int | None:
    """Total number of pairs; None if one of the counts is unknown."""
    known = [found.count for found in pairs if found is not None]
    return sum(known) if len(known) == len(pairs) else None


def longest_pair(pairs: list[PairStats | None], limit: int | None) -> RowShape | None:
    """The largest of the known pairs."""
    return longest_row_of([found.answers for found in pairs if found is not None], 2, limit)


def mean_row_of(answers: AnswerStats | None, sequences: int, limit: int | None) -> RowShape | None:
    """A row with `sequences` answers to a prompt of mean length, each of at most `limit` tokens."""
    if answers is None:
        return None
    answer = min(answers.longest_answer, limit or answers.longest_answer)
    return RowShape(answers.mean_prompt, answer, sequences)


def mean_pair(pairs: list[PairStats | None], limit: int | None) -> RowShape | None:
    """A pair whose prompt has the mean length, estimated from the first known set of pairs."""
    known = next((found for found in pairs if found is not None), None)
    return None if known is None else mean_row_of(known.answers, 2, limit)


def longest_experience(answers: AnswerStats | None, limit: int | None) -> RowShape | None:
    """The largest row of an experience: the longest prompt with all of its answers."""
    return longest_row_of([answers] if answers else [], answers.k if answers else 2, limit)
