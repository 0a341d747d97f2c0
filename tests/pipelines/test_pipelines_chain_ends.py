"""Jobs on a cluster that are refused, killed or cancelled, also while nobody looks: what is told, and what goes on.

The stages pretend to work, so that each of these runs on the fake cluster as well as on the real one.
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from pipelines_cluster import Slurm, wait_for
from pipelines_slurm_run import SlurmRun
from pipelines_smallest import pipeline

pytestmark = pytest.mark.timeout(600)

GENERATION = "iteration-000/heldout/generation"
REWARD = "iteration-000/heldout/reward"
EVALUATION = "iteration-000/evaluation"
TRAINING = "iteration-001/training"


def test_what_slurm_refuses_is_told_and_what_was_submitted_before_is_cancelled(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm, stages={"prompts/train": {"directives": {"no-such-option": "1"}}})
    result = run.pipeline("run", str(run.config), "--iters", "0", "--detach")
    assert result.returncode == 2
    assert "submitting stage prompts/train failed" in result.stderr
    assert "unrecognized option '--no-such-option" in result.stderr
    assert "The jobs submitted before were cancelled" in result.stderr
    assert "Traceback" not in result.stderr
    wait_for(run.is_over, 200, "all jobs end")


def test_a_command_that_was_killed_before_it_noted_its_jobs(tmp_path: Path, slurm: Slurm) -> None:
    """The next one cancels what is left of that, and submits anew; what ends unknown fails, so that nothing goes on."""
    run = SlurmRun.pretended(tmp_path, slurm, setup__world=["wait", "wait"])
    run.detach(iterations=0)
    run.wait_until_waiting("setup/world")
    record = run.path / "logs/setup/world/attempt-1/jobs.json"
    jobs = json.loads(record.read_text())
    record.unlink()
    run.detach(iterations=0)
    wait_for(lambda: jobs["work"] not in slurm.jobs(), 200, "the unknown job ends")
    run.wait_until_waiting("setup/world", times=2)
    (run.path / "logs/setup/world/attempt-2/jobs.json").unlink()
    run.release("setup/world")
    run.wait()
    assert run.digests().keys() == {"setup/world"}
    run.detach(iterations=0)
    run.wait_for(lambda: "prompts/train" in run.digests(), 200, "it goes on")
    assert len(list((run.path / "logs/setup/world").iterdir())) == 2
    run.pipeline("cancel", str(run.path))
    wait_for(run.is_over, 200, "all jobs end")


SLOW = """
import os, pathlib, time
folder = pathlib.Path({folder!r})
(folder / f"start-{{os.getpid()}}").touch()
for _ in range(600):
    if (folder / "go").exists():
        break
    time.sleep(0.1)
raise ImportError("none here")
"""
"""In the place of numpy, which submitit loads first if it can."""


def test_a_chain_outlives_a_killed_job_an_early_notice_and_accounting(tmp_path: Path, slurm: Slurm) -> None:
    """The job of a light stage, which nobody looks after, is killed while its Python still starts; what it starts in
    its place is told to stop then, and once more while it asks for the versions of the environment. While accounting
    is away, the stages go on; when it is back, it tells what happened."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "numpy.py").write_text(SLOW.format(folder=str(slow)))
    run = SlurmRun.pretended(
        tmp_path, slurm, stages={"setup/world": {"setup": [f"export PYTHONPATH={slow}"]}},
        iteration_000__heldout__generation=["wait", "wait"],
    )  # fmt: skip
    run.detach(iterations=0)
    run.wait_for(lambda: any(slow.glob("start-*")), 200, "Python starts")
    (start,) = slow.glob("start-*")
    os.kill(int(start.name.partition("-")[2]), signal.SIGKILL)
    run.wait_for(lambda: any(path != start for path in slow.glob("start-*")), 200, "it starts again")
    ((world, _),) = run.tasks("setup/world")
    slurm.run("scancel", "--signal=USR2", world)
    with run.unanswered() as is_asked:
        (slow / "go").touch()
        run.wait_for(lambda: run.events("requeue"), 200, "the job asks for a requeue")
        run.wait_for(is_asked, 200, "it looks at the environment")
        slurm.run("scancel", "--signal=USR2", world)
    run.wait_for(lambda: len(run.events("requeue")) == 2, 200, "the job asks for another requeue")

    run.wait_until_waiting(GENERATION, times=2)
    (task, _), _ = run.tasks(GENERATION)
    slurm.kill("slurmdbd")
    try:
        slurm.run("scancel", task)
        run.release(GENERATION)
        run.wait_for(lambda: REWARD in run.digests(), 200, "what reads that stage is published")
        assert "The history of some jobs is not known: `sacct" in run.status()
    finally:
        slurm.up()
    line = rf"{GENERATION}: job {task} on node\d: cancelled by"
    wait_for(lambda: re.search(line, run.status()), 200, "the controller has told accounting of the cancelled task")
    status = run.status()
    assert re.search(rf"setup/world: job {world} .* exit code 137, and was started again", status), status
    assert re.search(rf"setup/world: job {world} .* requeued \(signal, \d+ s before the time limit\)", status), status
    assert not run.events("failed")
    run.wait()


def test_a_cancelled_finishing_job_is_named(tmp_path: Path, slurm: Slurm) -> None:
    """Nobody is left to finalize it then: status asks accounting, and the next command takes note of it."""
    run = SlurmRun.pretended(tmp_path, slurm, setup__world=["wait"])
    run.detach(iterations=0)
    finishing = run.finishing_job(GENERATION)
    slurm.run("scancel", finishing)
    run.release("setup/world")
    status = run.wait()
    line = rf"{GENERATION}: job {finishing} before it started: cancelled by"
    assert re.search(line, status), status
    assert re.search(rf"{EVALUATION} +│ blocked", status), status
    assert len(re.findall(": cancelled", status)) == 1, "what Slurm cancelled because of that is not told one by one"
    run.detach(iterations=0)
    assert re.search(line, run.wait())
    assert EVALUATION in run.digests()
    assert "is finished: all 6 stages are published; nothing to do" in run.detach(iterations=0)


def test_the_nodes_of_a_training_meet_at_the_first_of_them(tmp_path: Path, slurm: Slurm, pretended_run: Path) -> None:
    """Only the training runs on the cluster, the other stages on this machine."""
    result = pipeline("fork", str(pretended_run), "--from-iteration", "1", "--name", tmp_path.name)
    assert result.returncode == 0, result.stderr
    config = pretended_run.with_name(tmp_path.name) / "config.yaml"
    command = ["run", str(config), "--iters", "1", "--force", TRAINING, "training.parallel.dp=2"]
    stages = f"executor.stages={{{TRAINING}: {{kind: slurm, nodes: 2}}}}"
    result = pipeline(*command, stages, env={**os.environ, **slurm.environment})
    assert result.returncode == 0, result.stderr
    logs = [path.read_text() for path in (config.parent / "logs" / TRAINING).rglob("stage.log")]
    places = [re.search(r"as node (\d) of node1:(\d+)", log) for log in logs]
    assert sorted(place[1] for place in places if place) == ["0", "1"]
    assert len({place[2] for place in places if place}) == 1
