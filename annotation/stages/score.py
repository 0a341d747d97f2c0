"""Declares the stage `score`: scores every answer with one scorer. Each kind's own requirements are declared in its
module (annotation/scorers/)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from annotation.scorers.base import CPU_TOKENS, ModelSettings, ScoreConfig
from contracts.declaration import ModelUse, ProcessLayout, Stage, Workload
from contracts.errors import UserError
from contracts.operations import ModelLayout, Operations, shape_of
from contracts.outlook import FILE_BYTES, LOGPROB_BYTES, PROCESS_BYTES, SAMPLE_BYTES, STAGE_BYTES, Memory, Outlook
from contracts.records import SCORES


@dataclass(frozen=True)
class Scoring(Stage[ScoreConfig]):
    """The scoring of answers by a scorer of any kind."""

    layout_keys: tuple[str, ...] = ("replicas",)
    memory_fix: str = "Lower the scorer's batch_tokens or replicas, or take a smaller model."

    def models(self, config: ScoreConfig) -> tuple[ModelUse, ...]:
        """The models of the scorer."""
        return config.models(config.rollouts)

    def libraries(self, config: ScoreConfig) -> tuple[str, ...]:
        """The libraries of the scorer."""
        return config.libraries()

    def follows(self, config: ScoreConfig) -> str | None:
        """The input that it can stream: the rollouts, unless it also reads pairs or scores made from all of them."""
        return "rollouts" if config.pairs is None and config.follows_rollouts else None

    def memory(self, config: ScoreConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Memory of one replica with its model."""
        size = outlook.size_of(config.model_path) if config.model_path else None
        if size is None:
            return None
        parts = config.memory(size, outlook.answers_of(config.rollouts), on_gpu=on_gpu)
        return Memory({**parts, "process": PROCESS_BYTES}, config.replicas_of_shards)

    def operations(self, config: ScoreConfig, outlook: Outlook, *, on_gpu: bool) -> Operations | None:
        """A forward pass over the answers, or only over those in pairs; if answers are compared, over each comparison
        in both orders. A prompt is computed once for all its answers."""
        size = outlook.size_of(config.model_path) if config.model_path else None
        answers = outlook.answers_of(config.rollouts)
        if size is None or answers is None or not isinstance(config, ModelSettings):
            return None
        prompts, sequences, answer = answers.prompts.count, answers.count, answers.longest_answer
        if config.pairs is not None and (pairs := outlook.pairs_of(config.pairs)) is not None:
            sequences = min(sequences, 2 * pairs.count)
        if config.compares:
            against = getattr(config, "opponents", None) or max(1, answers.k - 1)
            prompts, sequences, answer = sequences * against, sequences * against, 2 * answer
        return Operations(
            kind="scoring",
            model=shape_of(size),
            number={"float32": 4, "bfloat16": 2}.get(config.dtype, 2 if on_gpu else 4),
            layout=ModelLayout(dp=config.replicas_of_shards),
            sequences=sequences,
            prompt_tokens=prompts * answers.mean_prompt,
            answer_tokens=sequences * answer,
            length=answers.mean_prompt + answer,
            logits=sequences * answer if config.reads_tokens and not config.as_classifier else 0,
            batch=config.batch_tokens if on_gpu else min(config.batch_tokens, CPU_TOKENS),
        )

    def published_bytes(self, config: ScoreConfig, outlook: Outlook) -> int | None:
        """answers · 256 bytes, plus max_new_tokens · 24 bytes per answer if each token has a number (log-probabilities,
        values, step rewards)."""
        answers = outlook.answers_of(config.rollouts)
        if answers is None:
            return None
        count = answers.count
        if config.pairs is not None and (pairs := outlook.pairs_of(config.pairs)):
            count = min(count, 2 * pairs.count)
        tokens = answers.longest_answer * LOGPROB_BYTES if config.reads_tokens or config.rewards_tokens else 0
        return count * (SAMPLE_BYTES + tokens) + answers.shards * FILE_BYTES + STAGE_BYTES

    def workload(self, config: ScoreConfig) -> Workload:
        """The scorer's workload; without a model it is one job."""
        return config.workload

    def layout(self, config: ScoreConfig) -> ProcessLayout:
        """One process per replica."""
        return ProcessLayout(config.processes)

    def label(self, config: ScoreConfig) -> str:
        """The kind and its model, so that consecutive stages with the same ones share a process that keeps the model
        loaded; empty without a model or with several replicas."""
        path = config.model_path
        return f"{config.kind} {path}" if path is not None and config.replicas_of_shards == 1 else ""

    def spread(self, config: ScoreConfig, devices: int, nodes: int | None = None) -> ScoreConfig:
        """A replica of the model on every device."""
        if devices <= 1 or not isinstance(config, ModelSettings) or "replicas" in config.model_fields_set:
            return config
        return self.with_layout(config, {"replicas": devices})

    def with_layout(self, config: ScoreConfig, sizes: Mapping[str, Any]) -> ScoreConfig:
        """The config with the given number of replicas."""
        if unknown := sorted(sizes.keys() - config.roles):
            raise UserError(f"a scorer of the kind {config.kind} has no {unknown[0]}. Take it out of the layout.")
        return config.model_copy(update=sizes)


SCORE = Scoring(ScoreConfig, SCORES, "annotation.scoring:run", preflight="annotation.preflight:check_scorer")
