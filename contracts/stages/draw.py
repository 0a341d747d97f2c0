"""Declares the draw stage: the prompts of an iteration, drawn from prompt sets."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import Stage
from contracts.mixture import DrawConfig
from contracts.outlook import STAGE_BYTES, Outlook, RowStats
from contracts.records import PROMPTS


@dataclass(frozen=True)
class PromptDraw(Stage[DrawConfig]):
    """The stage that draws an iteration's prompts."""

    def rows(self, config: DrawConfig, path: Path, outlook: Outlook) -> RowStats | None:
        """`count` rows of the mean length of all sources' rows."""
        sources = [outlook.rows_of(source) for source in config.sources.values()]
        known = [source for source in sources if source is not None]
        if len(known) < len(sources):
            return None
        rows, size = sum(source.count for source in known), sum(source.bytes for source in known)
        return RowStats(config.count, size * config.count // max(1, rows), max(source.longest for source in known))

    def published_bytes(self, config: DrawConfig, outlook: Outlook) -> int | None:
        """Bytes of the rows and of a stage's other files."""
        rows = outlook.rows_of(config.output)
        return None if rows is None else rows.bytes + STAGE_BYTES


DRAW = PromptDraw(DrawConfig, PROMPTS, "contracts.drawing:run", environment="annotation")
