"""Preference pairs, chosen by scores."""

from dataclasses import dataclass

from annotation.config import PairsConfig
from contracts.declaration import Stage
from contracts.outlook import ID, STAGE, TEXT, Outlook, PairStats
from contracts.records import PAIRS

PAIR = 640
"""Bytes that a pair has beside its tokens."""


@dataclass(frozen=True)
class PairChoice(Stage[PairsConfig]):
    """The choice of pairs."""

    def pairs(self, config: PairsConfig, outlook: Outlook) -> PairStats | None:
        """One for each prompt, or k (k - 1) / 2."""
        answers = outlook.answers_of(config.rollouts)
        if answers is None:
            return None
        each = answers.k * (answers.k - 1) // 2 if config.strategy == "all" else 1
        return PairStats(answers.prompts.count * each, answers)

    def published_bytes(self, config: PairsConfig, outlook: Outlook) -> int | None:
        """2 · pairs · (9 · prompt + 2 · max_new_tokens · 16 + 640): as JSONL and as Parquet."""
        pairs = self.pairs(config, outlook)
        if pairs is None:
            return None
        prompts, tokens = pairs.answers.prompts, pairs.answers.longest_answer
        text = (2 + ID) * prompts.bytes // max(1, prompts.count)
        return 2 * pairs.count * (text + 2 * tokens * (ID + TEXT) + PAIR) + STAGE


CHOOSE_PAIRS = PairChoice(PairsConfig, PAIRS, "annotation.pairs:run")
