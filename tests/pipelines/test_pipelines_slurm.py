"""Real stages on a real Slurm cluster of four nodes: what they publish is what a laptop makes."""

import json
import re
import signal
from pathlib import Path

import pytest
import yaml
from pipelines_cluster import Cluster, wait_for
from pipelines_slurm_run import SlurmRun, digests, is_pending
from pipelines_smallest import FinishedRun, pipeline

TRAINING = "iteration-001/training"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_a_chain_without_a_driver_survives_what_a_cluster_does_to_it(
    tmp_path: Path, cluster: Cluster, finished_run: FinishedRun
) -> None:
    """A task of an array is cancelled, the controller is killed, a training is preempted and later reaches its time
    limit, and a node fails: the second iteration of a run ends by itself with the digests of the local run, and its
    report names all of that."""
    tasks = {"generation": {"tasks": 2}, "scoring": {"tasks": 1}, "iteration-001/reference": {"tasks": 2}}
    stages = {**tasks, TRAINING: {"partition": "low"}}
    run = fork_of(finished_run, cluster, "chain", from_iteration=1, executor={"kind": "slurm", "stages": stages})
    run.detach(iterations=1)

    sampling = "iteration-001/generation"
    task, _ = run.wait_for_tasks(sampling)[0]
    begun = run.path / "logs" / sampling / "attempt-1" / f"task-{task.partition('_')[2]}"
    run.wait_for(begun.exists, 200, "it has begun: Slurm says of no other who has cancelled it")
    cluster.run("scancel", task)
    run.wait_for(lambda: sampling in [event["stage"] for event in run.events("job ended")], 300, "its end is told")

    cluster.restart_controller()

    with run.frozen(TRAINING) as pids:
        ((training, node),) = run.tasks(TRAINING)
        blocker = cluster.submit("sleep 600", "--partition=gpu", f"--nodelist={node}", "--exclusive")
        wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 200, "the training is told")
    run.wait_for(lambda: run.events("requeue"), 200, "it asks for a requeue")
    cluster.run("scancel", blocker)
    with run.frozen(TRAINING) as pids:
        assert run.tasks(TRAINING)[0][0] == training
        cluster.run("scontrol", "update", f"jobid={training}", "timelimit=1")
        wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 200, "the training is told")
    run.wait_for(lambda: len(run.events("requeue")) == 2, 200, "it asks for a requeue")
    cluster.run("scontrol", "update", f"jobid={training}", "timelimit=60")  # a minute may end before its next step

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
        assert re.search(rf"{TRAINING}: job {training} .* requeued \(preempted\)", text)
        assert re.search(rf"{TRAINING}: job {training} .* requeued \(time limit\)", text)
        assert re.search(rf"iteration-001/heldout/generation: job \d+_\d on {node}: its node failed", text)


def test_a_driver_on_a_cluster_makes_what_one_on_a_laptop_makes(cluster: Cluster, finished_run: FinishedRun) -> None:
    """It is killed while a generation runs; the next one takes up the jobs that go on."""
    executor = {"kind": "slurm", "stages": {"generation": {"tasks": 2}, "scoring": {"tasks": 1}}}
    run = fork_of(finished_run, cluster, "driven", from_iteration=2, executor=executor)
    driver = run.start("--iters", "1", "--force", "iteration-001/heldout")
    tasks = {id for id, _ in run.wait_for_tasks("iteration-001/heldout/generation")}
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert tasks & cluster.jobs()
    result = run.pipeline("run", str(run.config), "--iters", "1")
    assert result.returncode == 0, result.stderr
    assert run.digests() == digests(finished_run.path, last=1)
    assert all(attempt.name == "attempt-1" for attempt in (run.path / "logs").rglob("attempt-*")), "nothing twice"
    run.wait_for(run.is_over, 200, "its last job, whose process has said that it is done, leaves the queue")


def test_two_nodes_with_two_processes_each_give_the_losses_of_one(cluster: Cluster, finished_run: FinishedRun) -> None:
    """Only the training runs on the cluster."""
    executor = {"warm": False, "stages": {TRAINING: {"kind": "slurm", "nodes": 2}}}
    run = fork_of(finished_run, cluster, "nodes", from_iteration=2, executor=executor)
    driver = run.start("--iters", "1", "--force", TRAINING, "training.parallel.dp=4")
    try:
        run.wait_for(lambda: run.events("published") or driver.poll() is not None, 300, "the training is published")
    finally:
        driver.send_signal(signal.SIGINT)  # what comes after it makes no difference
        driver.wait()
    record = json.loads((run.path / f"logs/{TRAINING}/attempt-1/jobs.json").read_text())
    assert {row["NodeList"] for row in cluster.accounting([record["work"]]).values()} == {"node[1-2]"}
    here, there = (read_losses(path / TRAINING) for path in (finished_run.path, run.path))
    assert len(here) == len(there) > 3
    for one, four in zip(here, there, strict=True):
        assert one == pytest.approx(four, abs=1e-4)


def fork_of(finished: FinishedRun, cluster: Cluster, name: str, *, from_iteration: int, executor: object) -> SlurmRun:
    """A run on the cluster that shares the iterations before `from_iteration` with the finished one."""
    result = pipeline("fork", str(finished.path), "--from-iteration", str(from_iteration), "--name", name)
    assert result.returncode == 0, result.stderr
    config = finished.path.with_name(name) / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "executor": executor}))
    run = SlurmRun(config, cluster)
    run.path = config.parent
    return run


def read_losses(training: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (training / "training-log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
