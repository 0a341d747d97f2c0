"""The memory that the driver estimates for a training is what the training takes."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import IDS, ROOT, SPECIAL, make_model, make_pairs, make_reference, publish

from contracts.config import validate
from contracts.outlook import PROCESS_BYTES
from contracts.records import PAIRS, SCORES
from pipelines.planning.sizes import read_size
from training.config import PolicyConfig
from training.estimates import RowShape, training_memory

WIDE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
ROW = RowShape(prompt=96, answer=96, sequences=2)
ROWS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose activations are what a training on these pairs, all as long as `ROW`, takes most memory for."""
    folder = tmp_path_factory.mktemp("memory")
    rng = random.Random(0)
    words = range(len(SPECIAL), len(IDS))
    rows = []
    for pair in make_pairs(ROWS):
        prompt, chosen, rejected = (tuple(rng.choices(words, k=ROW.prompt)) for _ in range(3))
        rows.append(replace_ids(pair, prompt, chosen, rejected))
    publish(folder / "pairs", PAIRS, rows)
    publish(folder / "reference", SCORES, make_reference(rows))
    return {
        "model": make_model(folder / "model", **WIDE),
        "pairs": [folder / "pairs"],
        "reference": [folder / "reference"],
        "global_batch": ROWS,
        "epochs": 2,  # from the second step on there are the moments of the first
    }


def replace_ids(pair: Any, prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> Any:
    """The pair with other tokens."""
    return msgspec.structs.replace(pair, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)


def peak(arguments: list[str]) -> int:
    """Bytes that a command takes at most."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([sys.executable, "-m", "training", "policy", *arguments], cwd=ROOT, env=env)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss << 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 8, "alpha": 16}}],
    ids=["packed", "recomputed", "lora"],
)
def test_a_training_takes_the_memory_that_was_estimated(
    settings: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    fields = {**inputs, **settings, "output": tmp_path / "out"}
    config = validate(PolicyConfig, fields, "test")
    size = read_size(config.model)
    assert size is not None
    estimate = training_memory(config, size, ROW, on_gpu=False)
    (tmp_path / "config.json").write_text(config.model_dump_json(exclude_unset=True))
    found = peak(["--config", str(tmp_path / "config.json")])
    assert estimate.total - PROCESS_BYTES > PROCESS_BYTES / 4  # it is not only about Python and torch
    assert found < estimate.total < 1.5 * found
