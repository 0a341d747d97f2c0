"""One scorer's judgement of every answer."""

from collections.abc import Callable
from dataclasses import dataclass

from annotation.config import ScoreConfig
from contracts.declaration import ModelUse, ProcessLayout, Stage, Workload
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.outlook import FILE, LOGPROB, PROCESS, SAMPLE, STAGE, TEMPLATE_TOKENS, AnswerStats, Memory, Outlook
from contracts.records import SCORES

LOGITS_AT_ONCE = 1 << 26
"""Logits that exist at once in scoring by log-probabilities (annotation/logprobs.py)."""


@dataclass(frozen=True)
class Scoring(Stage[ScoreConfig]):
    """The judgement of answers by a scorer."""

    memory_fix: str = "Lower the scorer's batch_tokens or replicas, or take a smaller model."

    def models(self, config: ScoreConfig) -> tuple[ModelUse, ...]:
        """The scorer's, which is given token ids where it reads no text."""
        if config.model is None:
            return ()
        checks: dict[str, tuple[Callable[[ModelInfo], None], ...]] = {
            "reward_model": (ModelInfo.require_one_label, ModelInfo.require_chat_template),
            "pairwise": (ModelInfo.require_causal, ModelInfo.require_chat_template),
            "logprobs": (ModelInfo.require_causal,),
            "values": (_require_values,),
        }
        ids_of = config.rollouts if config.kind in ("logprobs", "values") else None
        return (ModelUse(config.model, checks[config.kind], ids_of=ids_of),)

    def libraries(self, config: ScoreConfig) -> tuple[str, ...]:
        """Those that load a model."""
        return ("torch", "transformers")

    def memory(self, config: ScoreConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """That of one replica with its model."""
        size = outlook.size_of(config.model) if config.model else None
        if size is None:
            return None
        return scoring_memory(config, size, outlook.answers_of(config.rollouts), on_gpu=on_gpu)

    def published_bytes(self, config: ScoreConfig, outlook: Outlook) -> int | None:
        """answers · 256, and for log-probabilities and values max_new_tokens · 24 an answer."""
        answers = outlook.answers_of(config.rollouts)
        if answers is None:
            return None
        count = answers.count
        if config.pairs is not None and (pairs := outlook.pairs_of(config.pairs)):
            count = min(count, 2 * pairs.count)
        tokens = answers.longest_answer * LOGPROB if config.kind in ("logprobs", "values") else 0
        return count * (SAMPLE + tokens) + answers.shards * FILE + STAGE

    def workload(self, config: ScoreConfig) -> Workload:
        """A rule's replicas are processes of one job."""
        return "light" if config.kind == "rule" else "scoring"

    def layout(self, config: ScoreConfig) -> ProcessLayout:
        """Replicas."""
        return ProcessLayout(config.replicas)

    def spread(self, config: ScoreConfig, devices: int, nodes: int | None = None) -> ScoreConfig:
        """A replica of the model on every device."""
        if devices <= 1 or config.kind == "rule" or "replicas" in config.model_fields_set:
            return config
        return config.model_copy(update={"replicas": devices})


def _require_values(model: ModelInfo) -> None:
    if not model.has_value_head:
        model.require_one_label()


def scoring_memory(config: ScoreConfig, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> Memory:
    """Memory of one replica: weights a·P, and one layer's work on N = batch_tokens tokens without gradients.

    That is N · (16 h + a · (2 (q + k) + 3 i)); log-probabilities take up to 2^26 logits in three copies besides, and
    the kind pairwise those of the last token of each question, which has 64 tokens at least.
    """
    number = {"float32": 4, "bfloat16": 2}.get(config.dtype, 2 if on_gpu else 4)
    tokens = config.batch_tokens
    if answers is not None and config.kind == "pairwise":
        questions = answers.count * (config.opponents or max(1, answers.k - 1))
        tokens = min(tokens, questions * answers.question_tokens)
    elif answers is not None:
        tokens = min(tokens, answers.count * answers.longest)
    wide = size.query_width + size.key_width
    layer = 16 * size.hidden + number * (2 * wide + 3 * size.intermediate)
    parts = {"weights": size.parameters * number, "activations": tokens * layer}
    if config.kind == "logprobs":
        parts["logits"] = min(LOGITS_AT_ONCE, tokens * size.vocabulary) * (8 + number)
    if config.kind == "pairwise":
        parts["logits"] = -(-tokens // TEMPLATE_TOKENS) * size.vocabulary * (4 + number)
    return Memory({**parts, "process": PROCESS}, config.replicas)


SCORE = Scoring(ScoreConfig, SCORES, "annotation.scoring:run", preflight="annotation.preflight:check_scorer")
