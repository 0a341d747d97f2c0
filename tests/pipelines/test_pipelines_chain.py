"""Jobs on a cluster, with a driver and without: whatever happens to them, what they publish is what a laptop makes.

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


def test_a_chain_survives_what_a_cluster_does_to_it(tmp_path: Path, slurm: Slurm, pretended: dict[str, str]) -> None:
    """A stage is killed, a job is preempted, a task of an array is cancelled, the node of the other one fails, and a
    job reaches its time limit: the chain ends by itself, publishes the same, and its report names all of that."""
    run = SlurmRun.pretended(
        tmp_path, slurm, stages={"prompts/heldout": {"partition": "low"}},
        setup__world=["kill"], prompts__heldout=["wait"], iteration_000__heldout__generation=["wait", "wait"],
        iteration_000__heldout__reward=["wait"],
    )  # fmt: skip
    run.detach(iterations=0)

    run.wait_until_waiting("prompts/heldout")
    ((preempted, node),) = run.tasks("prompts/heldout")
    blocker = slurm.submit("sleep 600", "--partition=gpu", f"--nodelist={node}", "--exclusive")
    run.wait_for(lambda: run.events("requeue"), 60, "the preempted job asks for a requeue")
    slurm.run("scancel", blocker)

    run.wait_until_waiting(GENERATION, times=2)
    (cancelled, _), (failed, node) = run.tasks(GENERATION)
    slurm.run("scancel", cancelled)
    run.wait_for(lambda: len(run.tasks(GENERATION)) == 1, 60, "one task is gone")
    slurm.set_down(node)
    try:
        run.wait_until_waiting(REWARD)
        ((limited, _),) = run.tasks(REWARD)
        slurm.run("scontrol", "update", f"jobid={limited}", "timelimit=1")
        run.wait_for(lambda: len(run.events("requeue")) == 2, 90, "it is told")
        slurm.run("scontrol", "update", f"jobid={limited}", "timelimit=60")
        status = run.wait()
    finally:
        slurm.set_up(node)

    assert run.digests() == {name: pretended[name] for name in run.digests()}
    assert EVALUATION in run.digests()
    assert '<span class="badge finished">' in (run.path / "report.html").read_text()
    report = (run.path / "report.txt").read_text()
    for text in (report, status):
        assert re.search(r"setup/world: attempt-1 was killed by SIGKILL.* Tried again after \d+ s", text), text
        assert re.search(rf"prompts/heldout: job {preempted} .* requeued \(preempted\)", text), text
        assert re.search(rf"{GENERATION}: job {cancelled} on node\d: cancelled by", text), text
        assert re.search(rf"{GENERATION}: job {failed} on {node}: its node failed", text), text
        assert re.search(rf"{REWARD}: job {limited} .* requeued \(time limit\)", text), text


def test_after_a_failure_nothing_waits_for_ever_and_the_same_command_goes_on(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm, prompts__heldout=["mistake", "wait"])
    run.detach(iterations=0)

    status = run.wait()
    assert re.search(r"FAILED prompts/heldout: .*no such dictionary.* \(log: .*stage.log\)", status), status
    assert re.search(r"prompts/train +│ blocked .*by prompts/heldout", status), status
    assert re.search(rf"{EVALUATION} +│ blocked .*by {GENERATION}", status), status
    assert "prompts/heldout: attempt-1 failed with exit code 2. Not tried again." in status
    attached = run.pipeline("attach", str(run.path))
    assert attached.returncode == 1
    assert "prompts/heldout" in attached.stderr
    assert "no such dictionary" in attached.stderr
    assert "Traceback" not in attached.stderr
    logs = run.pipeline("logs", str(run.path))
    assert "no such dictionary" in logs.stdout, logs.stderr

    before = run.digests()
    run.detach(iterations=0)
    submitted = {event["stage"] for event in run.events("submitted") if event["attempt"] == "attempt-2"}
    assert {"prompts/heldout", EVALUATION} <= submitted
    assert not submitted & before.keys()
    assert run.jobs("prompts/heldout")
    said = run.detach(iterations=0)
    assert "0 of 6 stages submitted as 0 jobs" in said
    assert "under way already" in said
    result = run.pipeline("run", str(run.config), "--iters", "0")
    assert result.returncode == 2
    assert "pipeline attach" in result.stderr
    result = run.pipeline("run", str(run.config), "--iters", "0", "--detach", "generation.k=3")
    assert result.returncode == 2
    assert "with other settings" in result.stderr

    run.wait_until_waiting("prompts/heldout")
    before_cancel = len(run.events("submitted"))
    result = run.pipeline("cancel", str(run.path))
    assert result.returncode == 0, result.stderr
    wait_for(run.is_over, 60, "all jobs end")
    assert len(run.events("submitted")) == before_cancel, "what was cancelled is not tried again"
    assert run.pipeline("cancel", str(run.path)).stdout.startswith("nobody works on")


def test_a_stage_that_gets_no_further_between_two_time_limits_fails(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm, setup__world=["wait", "wait"])
    run.detach(iterations=0)
    for times in (1, 2):
        run.wait_until_waiting("setup/world", times)
        ((job, _),) = run.tasks("setup/world")
        slurm.run("scontrol", "update", f"jobid={job}", "timelimit=1")
        if times == 1:
            run.wait_for(lambda: run.events("requeue"), 90, "it is told")
            slurm.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    assert "FAILED setup/world: stage setup/world got no further between two ends of its time limit" in run.wait()


def test_jobs_outlive_their_driver(tmp_path: Path, slurm: Slurm, pretended: dict[str, str]) -> None:
    """The next driver takes them up; those that would make something else it cancels."""
    run = SlurmRun.pretended(tmp_path, slurm, iteration_000__heldout__generation=["wait"] * 4)
    driver = run.start("--iters", "0", "generation.k=3")
    run.wait_until_waiting(GENERATION, times=2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    others = {id for id, _ in run.tasks(GENERATION)}
    driver = run.start("--iters", "0")
    run.wait_until_waiting(GENERATION, times=4)
    assert not others & slurm.jobs()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    tasks = {id for id, _ in run.tasks(GENERATION)}
    assert len(tasks) == 2
    driver, log = run.start("--iters", "0"), run.config.with_suffix(".log")
    run.wait_for(lambda: f"{GENERATION}  (goes on since an earlier command)" in log.read_text(), 120, "it says so")
    run.release(GENERATION)
    assert driver.wait(timeout=300) == 0, log.read_text()
    assert run.digests() == {name: pretended[name] for name in run.digests()}
    again = [path.parent.name for path in (run.path / "logs").rglob("attempt-*") if path.name != "attempt-1"]
    assert again == ["generation"], "nothing else twice"
    wait_for(run.is_over, 60, "all jobs end")


def test_a_driver_says_what_waits_and_what_happened_and_ends_its_jobs(tmp_path: Path, slurm: Slurm) -> None:
    """A stage is killed and tried again; a job whose node is down waits; Ctrl-C ends all of them."""
    stages = {"prompts/heldout": {"directives": {"nodelist": "node4"}}}
    run = SlurmRun.pretended(tmp_path, slurm, stages=stages, setup__world=["kill"])
    slurm.set_down("node4")
    try:
        driver = run.start("--iters", "0")
        log = run.config.with_suffix(".log")
        run.wait_for(lambda: " waits: ReqNodeNotAvail" in log.read_text(), 120, "it says so")
        assert "retry  setup/world  (was killed by SIGKILL" in log.read_text()
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=60) == 130
        wait_for(run.is_over, 60, "all jobs end")
    finally:
        slurm.set_up("node4")


def test_what_slurm_refuses_is_told_and_what_was_submitted_before_is_cancelled(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm, stages={"prompts/train": {"directives": {"no-such-option": "1"}}})
    result = run.pipeline("run", str(run.config), "--iters", "0", "--detach")
    assert result.returncode == 2
    assert "submitting stage prompts/train failed" in result.stderr
    assert "unrecognized option '--no-such-option" in result.stderr
    assert "What this command had submitted before was cancelled" in result.stderr
    assert "Traceback" not in result.stderr
    wait_for(run.is_over, 60, "all jobs end")


def test_a_command_that_was_killed_before_it_noted_its_jobs(tmp_path: Path, slurm: Slurm) -> None:
    """The next one cancels what is left of that, and submits anew; what ends unknown fails, so that nothing goes on."""
    run = SlurmRun.pretended(tmp_path, slurm, setup__world=["wait", "wait"])
    run.detach(iterations=0)
    run.wait_until_waiting("setup/world")
    record = run.path / "logs/setup/world/attempt-1/jobs.json"
    jobs = json.loads(record.read_text())
    record.unlink()
    run.detach(iterations=0)
    wait_for(lambda: jobs["work"] not in slurm.jobs(), 60, "the unknown job ends")
    run.wait_until_waiting("setup/world", times=2)
    (run.path / "logs/setup/world/attempt-2/jobs.json").unlink()
    run.release("setup/world")
    run.wait()
    assert run.digests().keys() == {"setup/world"}
    run.detach(iterations=0)
    run.wait_for(lambda: "prompts/train" in run.digests(), 200, "it goes on")
    assert len(list((run.path / "logs/setup/world").iterdir())) == 2
    run.pipeline("cancel", str(run.path))
    wait_for(run.is_over, 60, "all jobs end")


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
    run.wait_for(lambda: any(slow.glob("start-*")), 60, "Python starts")
    (start,) = slow.glob("start-*")
    os.kill(int(start.name.partition("-")[2]), signal.SIGKILL)
    run.wait_for(lambda: any(path != start for path in slow.glob("start-*")), 60, "it starts again")
    ((world, _),) = run.tasks("setup/world")
    slurm.run("scancel", "--signal=USR2", world)
    (slow / "go").touch()
    run.wait_for(lambda: run.events("requeue"), 60, "the job asks for a requeue")
    run.wait_for((run.path / "logs/setup/world/attempt-1/prepare.lock").exists, 60, "it looks at the environment")
    slurm.run("scancel", "--signal=USR2", world)
    run.wait_for(lambda: len(run.events("requeue")) == 2, 60, "the job asks for another requeue")

    run.wait_until_waiting(GENERATION, times=2)
    (task, _), _ = run.tasks(GENERATION)
    slurm.kill("slurmdbd")
    try:
        slurm.run("scancel", task)
        run.release(GENERATION)
        run.wait_for(lambda: REWARD in run.digests(), 200, "what reads that stage is published")
        assert "What happened to some of the jobs on the way is not known: `sacct" in run.status()
    finally:
        slurm.up()
    line = rf"{GENERATION}: job {task} on node\d: cancelled by"
    wait_for(lambda: re.search(line, run.status()), 60, "the controller has told accounting of the cancelled task")
    status = run.status()
    assert re.search(rf"setup/world: job {world} .* exit code 137, and was started again", status), status
    assert re.search(rf"setup/world: job {world} .* requeued \(signal, \d+ s before the time limit\)", status), status
    assert not run.events("failed")
    run.wait()


def test_a_cancelled_finishing_job_is_named(tmp_path: Path, slurm: Slurm) -> None:
    """Nobody is left to finalize it then: status asks accounting, and the next command takes note of it."""
    run = SlurmRun.pretended(tmp_path, slurm)
    run.detach(iterations=0)
    finishing = run.finishing_job(GENERATION)
    slurm.run("scancel", finishing)
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
