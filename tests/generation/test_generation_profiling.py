"""Traces of the sampling of chosen shards, by every engine, which change nothing of what is sampled."""

from pathlib import Path

import pytest
from generation_runs import generate, require_trace


@pytest.mark.slow
def test_chosen_shards_are_traced(engine: str, policy: Path, prompts: Path, tmp_path: Path) -> None:
    """A server's shards are traced in test_generation_steering.py."""
    settings = {"policy": policy, "prompts": prompts, "k": 2, "max_new_tokens": 4, "shard_size": 4, "count": 12}
    made = generate(tmp_path / "out", profile_shards=[1], engine=engine, **settings)
    require_trace(tmp_path / "out.traces")
    plain = generate(tmp_path / "plain", engine=engine, **settings)
    assert (made.manifest.key, made.manifest.digest) == (plain.manifest.key, plain.manifest.digest)
