"""Traces of the sampling of chosen shards, by every engine, which change nothing of what is sampled."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from generation_runs import generate


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [{"engine": "transformers"}, {}, {"servers": 1}], ids=["transformers", "vllm", "server"]
)
def test_chosen_shards_are_traced(way: dict[str, Any], policy: Path, prompts: Path, tmp_path: Path) -> None:
    settings = {"policy": policy, "prompts": prompts, "k": 2, "max_new_tokens": 4, "shard_size": 4, "count": 12, **way}
    made = generate(tmp_path / "out", profile_shards=[1], **settings)
    traces = [path for path in (tmp_path / "out.traces").iterdir() if path.name.endswith(".json.gz")]
    assert len(traces) == 1
    assert traces[0].name.startswith("shard-00001")
    names = {event["name"] for event in json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]}
    assert any("attention" in name for name in names)
    if "servers" not in way:  # whose batches depend on when requests arrive
        plain = generate(tmp_path / "plain", **settings)
        assert (made.manifest.key, made.manifest.digest) == (plain.manifest.key, plain.manifest.digest)
