"""A whole run within one job of a scheduler (scripts/one-job.sh)."""

import json
from pathlib import Path

import pytest
from pipelines_cluster import Cluster, wait_for
from pipelines_slurm_run import digests
from pipelines_smallest import FinishedRun, write_smallest

from contracts.manifest import MANIFEST


@pytest.mark.timeout(1800)
def test_a_run_within_one_job_goes_back_to_the_queue_and_keeps_what_it_has_loaded(
    cluster: Cluster, root: Path, tmp_path: Path, finished_run: FinishedRun
) -> None:
    config, log, run = write_smallest(tmp_path), tmp_path / "job.log", tmp_path / "runs/smallest"
    options = [f"--chdir={root}", f"--output={log}", "--cpus-per-task=2", "--time=30"]
    command = [str(root / "scripts/one-job.sh"), str(config), "--iters", "0", "executor.parallel=1"]
    job = cluster.run("sbatch", "--parsable", *options, *command)

    def is_published(stage: str) -> bool:
        assert cluster.job(job)["JobState"] != "FAILED", log.read_text()
        return (run / stage / MANIFEST).exists()

    wait_for(lambda: is_published("prompts/heldout"), 300, "a stage is published")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 200, "the job is back in the queue")
    wait_for(lambda: is_published("iteration-000/evaluation"), 600, "the run is finished")
    cluster.wait_for_state(job, "COMPLETED")
    assert digests(run) == digests(finished_run.path, last=0)
    sampled = json.loads((run / "iteration-000/heldout/generation" / MANIFEST).read_text())
    assert sampled["facts"]["start"] == "kept"
