"""Declares the stages that mix offline pairs and pairs of earlier iterations into the training set."""

from dataclasses import dataclass

from annotation.data.mixing import PairsSampleConfig, PreferencesImportConfig, PreferencesScoresConfig
from contracts.declaration import ModelUse, Stage
from contracts.models import ModelInfo
from contracts.outlook import FILE_BYTES, SAMPLE_BYTES, STAGE_BYTES, AnswerStats, Outlook, PairStats
from contracts.records import PAIRS, ROLLOUTS, SCORES


@dataclass(frozen=True)
class PreferencesImport(Stage[PreferencesImportConfig]):
    """The import of preference pairs."""

    def models(self, config: PreferencesImportConfig) -> tuple[ModelUse, ...]:
        """The model whose chat template and tokenizer are used for the answers."""
        return (ModelUse(config.tokenizer, (ModelInfo.require_causal, ModelInfo.require_chat_template)),)

    def answers(self, config: PreferencesImportConfig, outlook: Outlook) -> AnswerStats | None:
        """Two answers per row, if the source can be read."""
        rows = outlook.rows_of(config.source, config.split)
        if rows is None:
            return None
        return AnswerStats(rows, 2, rows.longest_tokens, rows.longest_tokens, -(-rows.count // config.shard_size))

    def published_bytes(self, config: PreferencesImportConfig, outlook: Outlook) -> int | None:
        """Size of the source's texts and token ids."""
        answers = self.answers(config, outlook)
        return None if answers is None else 2 * answers.prompt_bytes + answers.shards * FILE_BYTES + STAGE_BYTES


@dataclass(frozen=True)
class PreferencesScores(Stage[PreferencesScoresConfig]):
    """The import of preferences as scores."""

    def published_bytes(self, config: PreferencesScoresConfig, outlook: Outlook) -> int | None:
        """256 bytes per answer."""
        answers = outlook.answers_of(config.rollouts)
        return None if answers is None else answers.count * SAMPLE_BYTES + answers.shards * FILE_BYTES + STAGE_BYTES


@dataclass(frozen=True)
class PairsSample(Stage[PairsSampleConfig]):
    """A random part of published pairs."""

    def pairs(self, config: PairsSampleConfig, outlook: Outlook) -> PairStats | None:
        """A share of all pairs; with `beside`, in proportion to those."""
        found = outlook.pairs_of(config.pairs)
        if found is None:
            return None
        wanted = found.count * config.share
        if config.beside is not None:
            beside = outlook.pairs_of(config.beside)
            wanted = found.count if beside is None else beside.count * config.share / (1 - config.share)
        return PairStats(min(found.count, max(1, round(wanted))), found.answers)

    def published_bytes(self, config: PairsSampleConfig, outlook: Outlook) -> int | None:
        """The same share of the bytes of the published pairs."""
        found, maker = self.pairs(config, outlook), outlook.pairs_of(config.pairs)
        if found is None or maker is None:
            return None
        answers = found.answers
        text = 9 * answers.prompts.bytes // max(1, answers.prompts.count)
        return found.count * (text + 32 * answers.longest_answer + 640) + STAGE_BYTES


IMPORT_PREFERENCES = PreferencesImport(PreferencesImportConfig, ROLLOUTS, "annotation.data.preferences:run_import")
PREFERENCES_SCORES = PreferencesScores(PreferencesScoresConfig, SCORES, "annotation.data.preferences:run_scores")
SAMPLE_PAIRS = PairsSample(PairsSampleConfig, PAIRS, "annotation.data.replay:run")
