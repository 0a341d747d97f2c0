"""Traces of chosen optimizer steps, from every rank, which change nothing of what is trained."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import run_cli

from contracts.artifacts import Artifact
from contracts.fingerprint import weights_fingerprint


@pytest.mark.slow
def test_chosen_steps_are_traced_by_every_rank_and_the_weights_stay_the_same(
    models: dict[str, Path], demonstrations: Path, tmp_path: Path
) -> None:
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    settings = [
        "sft", f"model={models['tied']}", f"demonstrations={demonstrations}", "global_batch=4", "max_steps=3",
        "learning_rate=1e-2", "parallel.dp=2",
    ]  # fmt: skip
    plain = run_cli(*settings, f"output={tmp_path / 'plain'}")
    assert "trace: " not in plain.stdout
    said = run_cli(*settings, f"output={tmp_path / 'out'}", "profile_steps=[2]", RATCHET_ATTEMPT=str(attempt))

    traces = sorted((attempt / "traces").iterdir())
    assert [trace.name for trace in traces] == [f"step-00002-rank-{rank}.json.gz" for rank in (0, 1)]
    for trace in traces:
        names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert any("Backward" in name for name in names)
        assert any("Optimizer.step" in name for name in names)
        assert f"trace: {trace}" in said.stdout
    assert weights_fingerprint(tmp_path / "out") == weights_fingerprint(tmp_path / "plain")
    keys = {Artifact.open(tmp_path / name).manifest.key for name in ("out", "plain")}
    assert len(keys) == 1
