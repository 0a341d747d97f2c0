"""Runs of real stages on a real Slurm cluster of four nodes: what they publish is what a laptop makes."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from pipelines_cluster import Cluster, wait_for
from pipelines_slurm_run import SlurmRun, digests, is_pending
from pipelines_smallest import FinishedRun, pipeline

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_a_driver_on_a_cluster_makes_what_one_on_a_laptop_makes(
    tmp_path: Path, cluster: Cluster, finished_run: FinishedRun
) -> None:
    """Its driver is killed twice meanwhile, when it has started all that can run; the next one takes up the jobs that
    go on."""
    run = SlurmRun.smallest(tmp_path, cluster)
    for stages in (
        {"setup/reward-model/generation", "iteration-000/heldout/generation"},
        {"iteration-000/heldout/reward"},
    ):
        driver = run.start("--iters", "0")
        run.wait_until_started(*stages)
        tasks = {id for stage in stages for id, _ in run.wait_for_tasks(stage)}
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert tasks & cluster.jobs()
    result = run.pipeline("run", str(run.config), "--iters", "0")
    assert result.returncode == 0, result.stderr
    assert "continues from an earlier command" in run.config.with_suffix(".log").read_text() + result.stdout
    assert run.digests() == digests(finished_run.path, last=0)
    assert all(attempt.name == "attempt-1" for attempt in (run.path / "logs").rglob("attempt-*")), "nothing twice"
    run.wait_for(run.is_over, 200, "its last job, whose process has said that it is done, leaves the queue")


def test_a_chain_without_a_driver_survives_what_a_cluster_does_to_it(
    tmp_path: Path, cluster: Cluster, finished_run: FinishedRun
) -> None:
    """A training is preempted, a task of an array is cancelled, the controller is killed, another training reaches its
    time limit and a node fails: it ends by itself with the digests of the local run, and its report names all of
    that."""
    run = SlurmRun.smallest(tmp_path, cluster, stages={"training": {"partition": "low"}})
    run.detach(iterations=1)

    with run.frozen("setup/sft") as pids:
        ((preempted, node),) = run.tasks("setup/sft")
        blocker = cluster.submit("sleep 600", "--partition=gpu", f"--nodelist={node}", "--exclusive")
        wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 200, "the training is told")
    wait_for(
        lambda: any(event["reason"] == "preempted" for event in run.events("requeue")), 200, "it asks for a requeue"
    )
    cluster.run("scancel", blocker)

    sampling = "setup/reward-model/generation"
    task, _ = run.wait_for_tasks(sampling)[0]
    begun = run.path / "logs" / sampling / "attempt-1" / f"task-{task.partition('_')[2]}"
    run.wait_for(begun.exists, 200, "it has begun: Slurm says of no other who has cancelled it")
    cluster.run("scancel", task)
    run.wait_for(lambda: sampling in [event["stage"] for event in run.events("job ended")], 300, "its end is told")

    cluster.restart_controller()

    with run.frozen("iteration-001/training") as pids:
        ((limited, _),) = run.tasks("iteration-001/training")
        cluster.run("scontrol", "update", f"jobid={limited}", "timelimit=1")
        wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 200, "the training is told")
    run.wait_for(lambda: len(run.events("requeue")) == 2, 200, "it asks for a requeue")
    cluster.run("scontrol", "update", f"jobid={limited}", "timelimit=60")  # a minute may end before its next step

    node = run.wait_for_tasks("iteration-001/heldout/generation")[0][1]
    cluster.set_down(node)
    try:
        status = run.wait()
    finally:
        cluster.set_up(node)

    assert run.digests() == digests(finished_run.path, last=1)
    report = (run.path / "report.txt").read_text()
    for text in (report, status):
        assert re.search(rf"{sampling}: job {task} on node\d: cancelled by", text)
        assert re.search(rf"setup/sft: job {preempted} .* requeued \(preempted\)", text)
        assert re.search(rf"iteration-001/heldout/generation: job \d+_\d on {node}: its node failed", text)
        assert re.search(rf"iteration-001/training: job {limited} .* requeued \(time limit\)", text)


def test_two_nodes_with_two_processes_each_give_the_losses_of_one(
    tmp_path: Path, cluster: Cluster, finished_run: FinishedRun
) -> None:
    """Only the training runs on the cluster, the other stages on this machine."""
    result = pipeline("fork", str(finished_run.path), "--from-iteration", "1", "--name", "nodes")
    assert result.returncode == 0, result.stderr
    forked = finished_run.path.with_name("nodes")
    config = yaml.safe_load((forked / "config.yaml").read_text())
    config["executor"] = {"stages": {"iteration-001/training": {"kind": "slurm", "nodes": 2}}}
    config["training"]["parallel"] = {"dp": 4}
    (forked / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, **cluster.environment}
    result = pipeline(
        "run", str(forked / "config.yaml"), "--iters", "1", "--force", "iteration-001/training", env=environment
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((forked / "logs/iteration-001/training/attempt-1/jobs.json").read_text())
    assert {row["NodeList"] for row in cluster.accounting([record["work"]]).values()} == {"node[1-2]"}
    here, there = (read_losses(path / "iteration-001/training") for path in (finished_run.path, forked))
    assert len(here) == len(there) > 3
    for one, four in zip(here, there, strict=True):
        assert one == pytest.approx(four, abs=1e-4)


def read_losses(training: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (training / "training-log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
