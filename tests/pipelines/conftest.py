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
        "well_formed": {"kind": "rule", "function": "embedded.reviews:well_formed"},
    },
    "generation": {"k": 4, "max_new_tokens": 12, "shard_size": 5, "engine": "transformers"},
    "training": {"global_batch": 8, "learning_rate": 1e-4},
}


RULES = '''
"""A scorer of the user's own, which finds something to prefer in the babble of a barely trained model."""


def variety(*, messages, response, finish_reason, answer):
    return len(set(response.split())) + len(response) / 100
'''


def write_smallest(folder: Path) -> Path:
    """Write the smallest run's config file, with its scorer beside it and its runs below it."""
    (folder / "rules.py").write_text(RULES)
    path = folder / "smallest.yaml"
    config = {**SMALLEST, "directory": str(folder / "runs")}
    config["scorers"] = {**SMALLEST["scorers"], "gold": {"kind": "rule", "function": f"{folder / 'rules.py'}:variety"}}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """Config file of the smallest run."""
    return write_smallest(tmp_path)


@pytest.fixture(scope="module")
def shared_smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of a run that the tests of a file share, in a directory with spaces in its name."""
    return write_smallest(tmp_path_factory.mktemp("end to end"))
