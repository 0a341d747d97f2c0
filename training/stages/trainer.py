"""What all trainings declare alike."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from contracts.config import validate
from contracts.declaration import ModelUse, ProcessLayout, Stage, Workload
from contracts.models import ModelInfo
from contracts.operations import ModelLayout, Operations, shape_of
from contracts.outlook import STAGE, AnswerStats, Memory, Outlook, PairStats
from training.config import TrainingConfig
from training.estimates import LongestRow, longest_of, number_bytes, trained_numbers, training_memory
from training.parallel import ParallelConfig, check_layout

T = TypeVar("T", bound=TrainingConfig)

PARALLEL = ("dp", "tp", "pp", "sp", "zero", "offload")
OWN = ("micro_batch_tokens", "gradient_checkpointing")
"""Keys of a layout, in the section `parallel` and beside it."""
LINE = 512
"""Bytes of an optimizer step in the training log."""


@dataclass(frozen=True)
class Training(Stage[T]):
    """A stage that trains a model. What differs is what it reads: `row_count` and `longest_row`."""

    launch: str | None = "training.launch:launch"
    is_worker_node: str | None = "training.launch:is_worker_node"
    preflight: str | None = "training.preflight:check_training"
    step_log: str = "training-log.jsonl"
    layout_keys: tuple[str, ...] = (*PARALLEL, *OWN)
    memory_fix: str = (
        "Lower micro_batch_tokens, set gradient_checkpointing=true, or spread the training over more devices with "
        "parallel.dp=N parallel.zero=3 (each with its section's name in front)."
    )

    def row_count(self, config: T, outlook: Outlook) -> int | None:
        """Rows that an epoch has."""
        raise NotImplementedError

    def longest_row(self, config: T, outlook: Outlook) -> LongestRow | None:
        """The largest row that it may meet, where its data tell."""
        raise NotImplementedError

    def mean_row(self, config: T, outlook: Outlook) -> LongestRow | None:
        """A row as it is in the mean: a prompt of mean length, and answers as long as allowed."""
        raise NotImplementedError

    def models(self, config: T) -> tuple[ModelUse, ...]:
        """The model that it trains."""
        start = ModelInfo.require_classifier_start if self.has_score_head(config) else ModelInfo.require_causal
        fits = functools.partial(_require_length, tokens=config.max_length or 1)
        checks: tuple[Callable[[ModelInfo], None], ...] = (start, *self.reads_as(config), fits)
        return (ModelUse(config.model, checks, functools.partial(check_layout, config.parallel)),)

    def reads_as(self, config: T) -> tuple[Callable[[ModelInfo], None], ...]:
        """What else its model must be."""
        return ()

    def libraries(self, config: T) -> tuple[str, ...]:
        """Those of its launcher."""
        deepspeed = ["deepspeed"] if config.parallel.deepspeed_stage else []
        return ("torch", "transformers", "accelerate", *deepspeed)

    def memory(self, config: T, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """That of one process."""
        size = outlook.size_of(config.model)
        if size is None:
            return None
        size = size.as_classifier() if self.has_score_head(config) else size
        return training_memory(config, size, self.longest_row(config, outlook), on_gpu=on_gpu)

    def operations(self, config: T, outlook: Outlook, *, on_gpu: bool) -> Operations | None:
        """Epochs over rows of mean length, in steps of a global batch."""
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
            number=number_bytes(config, on_gpu),
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
            trained=trained_numbers(config, size),
            recomputes=config.gradient_checkpointing,
            beside=len(self.models(config)) - 1,
        )

    def published_bytes(self, config: T, outlook: Outlook) -> int | None:
        """P · 4 (in bf16 2, and 2 for what is missing to fp32), the tokenizer, and 512 for each step's log line."""
        size = outlook.size_of(config.output)
        return None if size is None else size.checkpoint_bytes(4) + LINE * (self.steps(config, outlook) or 0) + STAGE

    def scratch_bytes(self, config: T, outlook: Outlook) -> int:
        """The state that it can go on from after a kill: T parameters and AdamW's two moments in fp32 (12 T; 4 T for
        SGD), and for an instant twice that, because the file is replaced by a whole new one."""
        size = outlook.size_of(config.output)
        return 2 * (12 if config.optimizer == "adamw" else 4) * trained_numbers(config, size) if size else 0

    def steps(self, config: T, outlook: Outlook) -> int | None:
        """Optimizer steps, at most."""
        if config.max_steps is not None:
            return config.max_steps
        rows = self.row_count(config, outlook)
        return None if rows is None else config.epochs * -(-rows // config.global_batch)

    def workload(self, config: T) -> Workload:
        """One job."""
        return "training"

    def layout(self, config: T) -> ProcessLayout:
        """What `parallel` says."""
        parallel = config.parallel
        talk = f"parallel: {parallel}" if parallel.processes > 1 or parallel.deepspeed_stage else ""
        fixed = "nodes" in parallel.model_fields_set
        return ProcessLayout(parallel.processes, parallel.nodes, fixed, str(parallel), parallel.processes, talk)

    def spread(self, config: T, devices: int, nodes: int | None = None) -> T:
        """Data parallelism over what tp, pp and sp leave."""
        parallel = config.parallel
        update = {} if nodes is None else {"nodes": nodes}
        dp = devices // (parallel.tp * parallel.pp * parallel.sp)
        if dp > 1 and "dp" not in parallel.model_fields_set:
            update["dp"] = dp
        return config.model_copy(update={"parallel": parallel.model_copy(update=update)}) if update else config

    def laid_out(self, config: T, sizes: Mapping[str, Any]) -> T:
        """With these in its `parallel`, and beside it; what the other settings do not allow is refused as ever."""
        parallel = config.parallel.model_dump(exclude_unset=True)
        parallel |= {key: size for key, size in sizes.items() if key in PARALLEL}
        own = {key: size for key, size in sizes.items() if key in OWN}
        validate(ParallelConfig, parallel, "layout")  # says what is wrong by the layout's own names
        return validate(type(config), config.model_dump(exclude_unset=True) | own | {"parallel": parallel}, "layout")

    def origin(self, config: T) -> Path | None:
        """The model that it trains."""
        return config.model


def _require_length(model: ModelInfo, tokens: int) -> None:
    model.require_length(tokens, "max_length")


def all_pairs(paths: list[Path], outlook: Outlook) -> list[PairStats | None]:
    """What is known of each."""
    return [outlook.pairs_of(path) for path in paths]


def count_of_pairs(pairs: list[PairStats | None]) -> int | None:
    """Of all together; None where it is not known of one."""
    known = [found.count for found in pairs if found is not None]
    return sum(known) if len(known) == len(pairs) else None


def longest_pair(pairs: list[PairStats | None], limit: int | None) -> LongestRow | None:
    """The largest pair, where it is known of any."""
    return longest_of([found.answers for found in pairs if found is not None], 2, limit)


def mean_of(answers: AnswerStats | None, sequences: int, limit: int | None) -> LongestRow | None:
    """So many answers to a prompt of mean length; longer sequences than `limit` are dropped."""
    if answers is None:
        return None
    answer = min(answers.longest_answer, limit or answers.longest_answer)
    return LongestRow(answers.mean_prompt, answer, sequences)


def mean_pair(pairs: list[PairStats | None], limit: int | None) -> LongestRow | None:
    """A pair in the mean, by the first set of which anything is known."""
    known = next((found for found in pairs if found is not None), None)
    return None if known is None else mean_of(known.answers, 2, limit)


def longest_experience(answers: AnswerStats | None, limit: int | None) -> LongestRow | None:
    """The largest row of an experience: all answers to a prompt."""
    return longest_of([answers] if answers else [], answers.k if answers else 2, limit)
