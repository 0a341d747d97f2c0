"""Declares the stage `pairs`: selects preference pairs by scores."""

from dataclasses import dataclass

from annotation.pairing.config import PairsConfig
from contracts.declaration import Stage
from contracts.outlook import ID_BYTES, STAGE_BYTES, TEXT_BYTES, Outlook, PairStats
from contracts.records import PAIRS

PAIR = 640
"""Bytes of a pair, not counting its tokens and texts."""


@dataclass(frozen=True)
class PairChoice(Stage[PairsConfig]):
    """The selection of preference pairs."""

    def pairs(self, config: PairsConfig, outlook: Outlook) -> PairStats | None:
        """For each prompt the maximum that the strategy proposes, up to per_prompt."""
        answers = outlook.answers_of(config.rollouts)
        if answers is None:
            return None
        return PairStats(answers.prompts.count * config.most(answers.k), answers)

    def published_bytes(self, config: PairsConfig, outlook: Outlook) -> int | None:
        """2 · pairs · (9 · prompt + 2 · max_new_tokens · 16 + 640) bytes, for JSONL and Parquet."""
        pairs = self.pairs(config, outlook)
        if pairs is None:
            return None
        prompts, tokens = pairs.answers.prompts, pairs.answers.longest_answer
        text = (2 + ID_BYTES) * prompts.bytes // max(1, prompts.count)
        return 2 * pairs.count * (text + 2 * tokens * (ID_BYTES + TEXT_BYTES) + PAIR) + STAGE_BYTES


CHOOSE_PAIRS = PairChoice(
    PairsConfig, PAIRS, "annotation.pairing.stage:run", preflight="annotation.preflight:check_pairs"
)
