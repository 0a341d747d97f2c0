"""A run that is as small as a run can be, with every kind of stage in it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "seed": 0,
    "world": {"demonstrations": 64, "train": 24, "preference": 24, "heldout": 10},
    "policy": "world:model",
    "sft": {"demonstrations": "world:demonstrations.jsonl", "global_batch": 16, "learning_rate": 1e-3},
    "prompts": {
        "train": {"source": "world:train.jsonl"},
        "heldout": {"source": "world:heldout.jsonl"},
        "per_iteration": 12,
    },
    "reward_model": {
        "prompts": {"source": "world:preference.jsonl"},
        "label": "gold",
        "training": {"global_batch": 8, "learning_rate": 5e-4},
    },
    "scorers": {
        "reward": {"kind": "reward_model"},
        "gold": {"kind": "rule", "function": "embedded.reviews:gold_score"},
    },
    "generation": {"k": 4, "max_new_tokens": 12, "shard_size": 5, "engine": "transformers"},
    "training": {"global_batch": 8, "learning_rate": 1e-4},
}


@pytest.fixture(scope="session")
def smallest_text() -> str:
    """The smallest run's YAML."""
    return yaml.safe_dump(SMALLEST)


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """Config file of the smallest run, whose directory is beside it."""
    path = tmp_path / "smallest.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, "directory": str(tmp_path / "runs")}))
    return path
