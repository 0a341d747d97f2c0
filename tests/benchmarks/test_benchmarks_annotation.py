"""The benchmark of scoring: its arithmetic, and a run of it on as little as can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.annotation import OURS, PIPELINE, compare

ROOT = Path(__file__).parents[2]


def line(seconds: float, scores: list[float], scoring: float | None = None) -> dict:
    phases = {} if scoring is None else {"scoring": scoring}
    return {"cpu_seconds": seconds, "scores": scores, "tokens": 9, "peak_memory_gib": 1.0, "phases": phases}


def test_scoring_is_compared_alone_and_whole_processes_with_what_they_start_with():
    lines = {
        OURS: [line(5.0, [1.0], 2.0), line(5.0, [1.0], 4.0)],
        PIPELINE: [line(8.0, [1.0]), line(8.0, [1.0])],
        "padded-4": [line(9.0, [1.0]), line(9.0, [1.0])],
        "padded-8": [line(6.0, [1.0]), line(6.0, [1.0 + 1e-3])],
    }
    found = compare(lines, {OURS: 5.0, PIPELINE: 2.0})
    assert found["ratio"] == 3.0
    assert found["ratio_of_whole_processes"] == 1.0
    assert (found["best_padded"], found["ratio_to_best_padded"]) == ("padded-8", 2.25)
    assert found["difference"] == pytest.approx(1e-3)


@pytest.mark.slow
def test_all_sides_give_the_same_scores():
    command = [sys.executable, "benchmarks/annotation.py", "long-k4", "--layers", "1", "--prompts", "2"]
    process = subprocess.run(
        [*command, "--repetitions", "1", "--batch-sizes", "2"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["long-k4"] > 0
    assert report["problems"] == []
    assert report["cases"]["long-k4"]["difference"] < 1e-5
