"""Declares the prompts stage: the import of a prompt set."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import Stage
from contracts.outlook import STAGE_BYTES, Outlook, RowStats, measure
from contracts.prompts import PromptsConfig
from contracts.records import PROMPTS

PROMPT = 160
"""Bytes of a published prompt in addition to its text."""


@dataclass(frozen=True)
class PromptImport(Stage[PromptsConfig]):
    """The stage that imports prompts."""

    def rows(self, config: PromptsConfig, path: Path, outlook: Outlook) -> RowStats | None:
        """Rows of the source up to `limit`; for a source on the Hub, rows of the output if it exists already."""
        source = outlook.rows_of(config.source, config.split) or measure(path)
        if source is None:
            return None
        count = min(source.count, config.limit or source.count)
        system = len((config.system or "").encode())
        share = source.bytes * count // max(1, source.count)
        return RowStats(count, share + count * (PROMPT + system), source.longest + system)

    def published_bytes(self, config: PromptsConfig, outlook: Outlook) -> int | None:
        """Bytes of the rows and of a stage's other files."""
        prompts = outlook.rows_of(config.output)
        return None if prompts is None else prompts.bytes + STAGE_BYTES


IMPORT_PROMPTS = PromptImport(
    PromptsConfig, PROMPTS, "contracts.importing:run", environment="annotation", conversations="source"
)
