"""Declares the stage that generates the toy task."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import Stage
from contracts.model_size import Size, size_from_config
from contracts.outlook import STAGE_BYTES, Outlook, RowStats
from contracts.records import WORLD
from embedded.config import WorldConfig

ROW = 200
"""Bytes per row of its data files."""


@dataclass(frozen=True)
class World(Stage[WorldConfig]):
    """The declaration of the stage `world`."""

    def libraries(self, config: WorldConfig) -> tuple[str, ...]:
        """The libraries that create the model."""
        return ("torch", "transformers")

    def size(self, config: WorldConfig) -> Size:
        """The size of the model, a Llama with attention heads of size 32."""
        from embedded.reviews import vocabulary  # its patterns take time to compile, and most runs have no toy task

        return size_from_config(
            {
                "model_type": "llama",
                "hidden_size": config.hidden_size,
                "intermediate_size": 3 * config.hidden_size,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.hidden_size // 32,
                "head_dim": 32,
                "vocab_size": len(vocabulary()) + 16,  # with its special tokens, rounded up
                "tie_word_embeddings": True,
                "max_position_embeddings": 128,
            }
        )

    def rows(self, config: WorldConfig, path: Path, outlook: Outlook) -> RowStats:
        """The rows of one of its files, NAME.jsonl."""
        count = getattr(config, path.stem, 0)
        return RowStats(count, count * ROW, ROW)

    def published_bytes(self, config: WorldConfig, outlook: Outlook) -> int:
        """The bytes of the model in fp32, with the tied head written a second time, and of the data."""
        size = self.size(config)
        rows = config.demonstrations + config.train + config.preference + config.heldout
        return size.checkpoint_bytes(4) + 4 * size.vocabulary * size.hidden + rows * ROW + STAGE_BYTES


MAKE_WORLD = World(WorldConfig, WORLD, "embedded.world:run", environment="training")
