"""Declares the stage `sft`, supervised fine-tuning on demonstrations."""

from dataclasses import dataclass

from contracts.operations import BYTES_PER_TOKEN
from contracts.outlook import Outlook
from contracts.records import CHECKPOINT
from training.config import SftConfig
from training.estimates import RowShape
from training.stages.trainer import Training


@dataclass(frozen=True)
class SftTraining(Training[SftConfig]):
    """Supervised fine-tuning."""

    def row_count(self, config: SftConfig, outlook: Outlook) -> int | None:
        """Number of demonstrations."""
        rows = outlook.rows_of(config.demonstrations)
        return None if rows is None else rows.count

    def mean_row(self, config: SftConfig, outlook: Outlook) -> RowShape | None:
        """A demonstration of mean length."""
        rows = outlook.rows_of(config.demonstrations)
        if rows is None:
            return None
        tokens = max(1, rows.bytes // (BYTES_PER_TOKEN * max(1, rows.count)))
        return RowShape(0, min(tokens, config.max_length or tokens), 1)

    def longest_row(self, config: SftConfig, outlook: Outlook) -> RowShape | None:
        """The longest demonstration."""
        rows = outlook.rows_of(config.demonstrations)
        longest = rows.longest_tokens if rows else config.max_length
        return None if longest is None else RowShape(0, min(longest, config.max_length or longest), 1)


SFT = SftTraining(SftConfig, CHECKPOINT, "training.sft:run", conversations="demonstrations")
