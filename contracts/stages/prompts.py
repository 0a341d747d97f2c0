"""Prompts, imported from where they are."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import Stage
from contracts.outlook import STAGE, Outlook, RowStats, measure
from contracts.prompts import PromptsConfig
from contracts.records import PROMPTS

PROMPT = 160
"""Bytes that a published prompt has beside its text."""


@dataclass(frozen=True)
class PromptImport(Stage[PromptsConfig]):
    """The import of prompts."""

    def rows(self, config: PromptsConfig, path: Path, outlook: Outlook) -> RowStats | None:
        """Those of the source, up to the limit; where nobody knows it (on the Hub) as many as are there already."""
        source = outlook.rows_of(config.source, config.split) or measure(path)
        if source is None:
            return None
        count = min(source.count, config.limit or source.count)
        system = len((config.system or "").encode())
        share = source.bytes * count // max(1, source.count)
        return RowStats(count, share + count * (PROMPT + system), source.longest + system)

    def published_bytes(self, config: PromptsConfig, outlook: Outlook) -> int | None:
        """The source's bytes, and 160 a row."""
        prompts = outlook.rows_of(config.output)
        return None if prompts is None else prompts.bytes + STAGE


IMPORT_PROMPTS = PromptImport(
    PromptsConfig, PROMPTS, "contracts.importing:run", environment="annotation", conversations="source"
)
