"""The arithmetic of the benchmark of Slurm, and what a process says of its shards; the rest needs a cluster."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import slurm, watch_shards

ROOT = Path(__file__).parents[2]


def test_a_straight_line_is_found_and_what_is_off_it():
    line = slurm.fit([100, 200, 400], [3.0, 5.0, 9.0])
    assert line == pytest.approx({"ms_per_shard": 20, "seconds": 1, "largest_deviation_percent": 0})
    assert slurm.fit([1, 2, 3], [1.0, 2.0, 6.0])["largest_deviation_percent"] == pytest.approx(100)


def test_slurm_times_are_read():
    assert slurm.cpu_time("00:01.500") == 1.5
    assert slurm.cpu_time("02:03:04") == 7384
    assert slurm.cpu_time("1-00:00:01") == 86401
    with pytest.raises(ValueError, match="'soon' is not a time"):
        slurm.cpu_time("soon")


def worker(shards: list[str], **parts: list[float]) -> dict[str, object]:
    return {"shards": shards, "cpu": 9.0, **{part: [0.0, 0.0] for part in watch_shards.PARTS}, **parts}


def test_what_a_shard_costs_is_what_is_not_computation():
    busy = worker(["a", "b"], loop=[10.0, 5.0], open=[2.0, 1.0], make=[6.0, 3.0], write=[1.0, 0.5])
    found = slurm.shard_figures([busy, worker([])])  # the second one publishes
    assert found["beyond_ms"]["seconds"] == {"commit": 500, "next": 1000}
    assert found["beyond_ms"]["cpu"] == {"commit": 250, "next": 500}
    assert (found["sharing_seconds"], found["sharing_cpu_seconds"]) == (3, 1.5)
    assert (found["compute_cpu_seconds"], found["load_cpu_seconds_per_task"]) == (2.5, 5)
    assert (found["workers"], found["stage_cpu_seconds"]) == (1, 18)
    with pytest.raises(RuntimeError, match="made twice"):
        slurm.shard_figures([busy, busy])


def run(mode: str, shards: int, jobs: float | None) -> dict[str, object]:
    seconds = {"wall": 10.0, "overhead": 8.0, "sharing": shards / 100, "sharing_cpu": shards / 200}
    seconds |= {
        "stage_cpu": 20.0,
        "compute_cpu": 5.0,
        "driver_cpu": 1.0,
        "commands_cpu": 2.0 if jobs else 21.0,
        "daemons_cpu": 0.5,
    }
    figures = {f"{name}_seconds": value for name, value in seconds.items()}
    return {**figures, "mode": mode, "shards": shards, "jobs_cpu_seconds": jobs, "load_cpu_seconds_per_task": 4.0}


def test_medians_lines_and_ratios():
    rows = [run("attached", count, jobs) for count in (100, 200) for jobs in (22.0, 32.0, 52.0)]
    rows.append(run("replicas", 200, None))
    peer = {"jobs_cpu_seconds_per_job": 0.6, "daemons_cpu_seconds_per_job": 0.01}
    report = slurm.summary(rows, peer, Namespace(shards=[100, 200], tasks=16, repetitions=3))
    assert [(found["mode"], found["shards"]) for found in report["runs"]] == [
        ("attached", 100),
        ("attached", 200),
        ("replicas", 200),
    ]
    assert [found["overhead_cpu_seconds"] for found in report["runs"]] == [30, 30, 17]
    assert report["lines"]["attached"]["sharing"]["ms_per_shard"] == pytest.approx(10)
    assert list(report["lines"]) == ["attached"]
    assert report["ratios"]["attached_to_replicas"]["overhead_cpu"] == pytest.approx(30 / 17, 1e-3)
    assert report["ratios"]["one_job_per_shard_to_attached"]["cpu_with_loading"] == pytest.approx(
        4.6 / (30 / 200), 1e-3
    )


def test_two_ways_must_publish_the_same():
    digests = {}
    slurm.require_same(digests, {"mode": "attached", "shards": 5, "digest": "a"})
    slurm.require_same(digests, {"mode": "attached", "shards": 6, "digest": "b"})
    with pytest.raises(RuntimeError, match="replicas, 5 shards: another digest"):
        slurm.require_same(digests, {"mode": "replicas", "shards": 5, "digest": "b"})


STAGE = """
import time
from benchmarks.watch_shards import watch
watch()
from contracts import workers
from contracts.publication import Publication
from contracts.ledger import Ledger
from contracts.records import SCORES
from contracts.stage import Context
from pathlib import Path
import sys

publication = Publication(Path(sys.argv[1]), SCORES, "score", "key")
publication.begin()

def open_worker():
    time.sleep(0.2)
    def make(name):
        time.sleep(0.1)
        publication.write_rows(name, [], Ledger("samples"))
    return make

workers.share_shards(Context(publication, 0, 1), ["shard-0", "shard-1"], open_worker)
"""


def test_a_process_leaves_what_its_shards_took(tmp_path):
    (tmp_path / "watched").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), watch_shards.FOLDER: str(tmp_path / "watched")}
    subprocess.run([sys.executable, "-c", STAGE, str(tmp_path / "output")], check=True, env=environment)
    (found,) = watch_shards.read(tmp_path / "watched")
    assert found["shards"] == ["shard-0", "shard-1"]
    assert found["open"][0] >= 0.2
    assert found["make"][0] >= 0.2
    assert 0 < found["write"][0] < found["make"][0] - 0.19
    assert found["loop"][0] > found["open"][0] + found["make"][0]
    assert 0 < found["loop"][1] < found["cpu"]
    json.dumps(slurm.shard_figures([found]))
