"""Jobs on a cluster, with a driver and without: whatever happens to them, what they publish is what a laptop makes.

The stages pretend to work, so that each of these runs on the fake cluster as well as on the real one.
"""

import re
import signal
from pathlib import Path

import pytest
import yaml
from pipelines_cluster import Slurm, wait_for
from pipelines_slurm_run import SlurmRun, digests
from pipelines_smallest import pipeline

from pipelines.planning.placement import placed_graph
from pipelines.run.directory import RunDirectory

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
    run.wait_for(lambda: run.events("requeue"), 200, "the preempted job asks for a requeue")
    slurm.run("scancel", blocker)

    run.wait_until_waiting(GENERATION, times=2)
    (cancelled, _), (failed, node) = run.tasks(GENERATION)
    slurm.run("scancel", cancelled)
    run.wait_for(lambda: len(run.tasks(GENERATION)) == 1, 200, "one task is gone")
    slurm.set_down(node)
    try:
        run.wait_until_waiting(REWARD)
        ((limited, _),) = run.tasks(REWARD)
        slurm.run("scontrol", "update", f"jobid={limited}", "timelimit=1")
        run.wait_for(lambda: len(run.events("requeue")) == 2, 200, "it is told")
        slurm.run("scontrol", "update", f"jobid={limited}", "timelimit=60")
        status = run.wait()
    finally:
        slurm.set_up(node)

    assert run.digests() == {name: pretended[name] for name in run.digests()}
    assert EVALUATION in run.digests()
    assert '<span class="badge finished">' in (run.path / "report.html").read_text()
    report = (run.path / "report.txt").read_text()
    for text in (report, status):
        assert re.search(r"setup/world: attempt-1 was killed by SIGKILL.* Retried after \d+ s", text), text
        assert re.search(rf"prompts/heldout: job {preempted} .* requeued \(preempted\)", text), text
        assert re.search(rf"{GENERATION}: job {cancelled} on node\d: cancelled by", text), text
        assert re.search(rf"{GENERATION}: job {failed} on {node}: its node failed", text), text
        assert re.search(rf"{REWARD}: job {limited} .* requeued \(time limit\)", text), text


@pytest.mark.slow
def test_pools_of_nodes_keep_their_stages_when_each_loses_a_node(
    tmp_path: Path, slurm: Slurm, pretended: dict[str, str]
) -> None:
    """Separation over two pools of nodes, without a driver: a job whose node fails starts again on its pool's other
    node, and what is published is what a laptop makes."""
    sampling, learning = "iteration-001/generation", TRAINING
    run = SlurmRun.pretended(
        tmp_path, slurm, iteration_001__generation=["wait", "wait"], iteration_001__training=["wait"]
    )
    pools = {"generation": {"nodes": "node[1-2]"}, "training": {"nodes": "node3,node4"}}
    placement = {"strategy": "separation", "pools": pools}
    run.config.write_text(yaml.safe_dump({**yaml.safe_load(run.config.read_text()), "placement": placement}))
    run.detach(iterations=1)

    lost = []
    try:
        for stage, pool, times in ((sampling, {"node1", "node2"}, 2), (learning, {"node3", "node4"}, 1)):
            run.wait_until_waiting(stage, times=times)
            nodes = {node for _, node in run.tasks(stage)}
            assert nodes <= pool, stage
            lost.append(min(nodes))
            slurm.set_down(lost[-1])
            run.release(stage)
        status = run.wait()
    finally:
        for node in lost:
            slurm.set_up(node)

    assert run.digests() == pretended
    for stage, node in zip((sampling, learning), lost, strict=True):
        assert re.search(rf"{stage}: job \S+ on {node}: its node failed", status), status
    pools_of = {event["stage"]: event.get("pool") for event in run.events("started")}
    assert (pools_of[sampling], pools_of[learning]) == ("generation", "training")


def test_a_pool_of_nodes_that_the_cluster_has_not_is_refused(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm)
    placement = "placement={strategy: separation, pools: {generation: {nodes: 'node[1-9]'}}}"
    result = run.pipeline("run", str(run.config), placement, "--detach")
    assert result.returncode == 2
    assert "the nodes node[1-9], but the cluster has no node5. It has node1, node2" in result.stderr
    assert not run.cluster.jobs()


def test_after_a_failure_nothing_waits_for_ever_and_the_same_command_goes_on(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm, prompts__heldout=["mistake", "wait"])
    run.detach(iterations=0)

    status = run.wait()
    assert re.search(r"FAILED prompts/heldout: .*no such dictionary.* \(log: .*stage.log\)", status), status
    assert re.search(r"prompts/train +│ blocked .*by prompts/heldout", status), status
    assert re.search(rf"{EVALUATION} +│ blocked .*by {GENERATION}", status), status
    assert "prompts/heldout: attempt-1 failed with exit code 2. Not retried." in status
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
    wait_for(run.is_over, 200, "all jobs end")
    assert len(run.events("submitted")) == before_cancel, "what was cancelled is not tried again"
    assert run.pipeline("cancel", str(run.path)).stdout.startswith("nobody works on")


@pytest.mark.slow
@pytest.mark.parametrize("slurm", ["fake"], indirect=True)
def test_a_gate_that_stops_ends_the_chain_and_it_is_not_submitted_again(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm)
    gate = {"metric": "reward_mean", "above": 0.4}  # it is 0.5 of every policy
    config = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump({**config, "gates": {"high": {**gate, "do": "stop"}}}))
    run.detach(iterations=2)
    reason = "the gate high stops the run after iteration 1: reward_mean is 0.5, above 0.4."
    assert reason in run.wait()
    assert "iteration-001/gate" in run.digests()
    assert not [stage for stage in run.digests() if stage.startswith("iteration-002")]
    assert [event["outcome"] for event in run.events("run ended")][-1] == "stopped"
    again = run.pipeline("run", str(run.config), "--iters", "2", "--detach")
    assert again.returncode == 3
    assert reason in again.stderr


def rolls_back(run: SlurmRun, **further: object) -> None:
    """Have every iteration's gate take the run back to the initial policy, with another beta from then on."""
    gate = {"metric": "reward_mean", "above": 0.4, "do": "rollback", "at_most": 9}  # it is 0.5 of every policy
    gate["changes"] = {"training": {"settings": {"beta": 0.3}}}
    config = {**yaml.safe_load(run.config.read_text()), "gates": {"back": gate}, **further}
    run.config.write_text(yaml.safe_dump(config))


def laptop(folder: Path, run: SlurmRun, iterations: int) -> dict[str, str]:
    """What the same run publishes under a driver, on this machine."""
    config = yaml.safe_load(run.config.read_text())
    path = folder / "laptop.yaml"
    path.write_text(yaml.safe_dump({**config, "name": "laptop", "executor": {"kind": "inline"}}))
    result = pipeline("run", str(path), "--iters", str(iterations))
    assert result.returncode == 0, result.stderr
    return digests(folder / "runs" / "laptop")


@pytest.mark.parametrize("slurm", [pytest.param("real", marks=pytest.mark.cluster)], indirect=True)
def test_a_gate_takes_a_chain_back_and_it_goes_on_by_itself(tmp_path: Path, slurm: Slurm) -> None:
    """With a lag some of a later iteration may be under way, or be made, and other than it is to be."""
    run = SlurmRun.pretended(tmp_path, slurm)
    rolls_back(run, lag=1)
    run.detach(iterations=3)
    check_rolled_back(tmp_path, run, iterations=3)
    assert not run.events("failed")


def check_rolled_back(folder: Path, run: SlurmRun, iterations: int) -> None:
    """Check that the run ends as it does on a laptop, and that every gate has taken it back."""
    status = run.wait(seconds=800)
    assert "iteration 2 starts from the initial policy" in status
    assert run.digests() == laptop(folder, run, iterations)
    graph = placed_graph(RunDirectory(run.path).config, iterations)
    assert graph.rollbacks == {f"iteration-00{i}/gate": 0 for i in range(1, iterations + 1)}
    assert [event["outcome"] for event in run.events("run ended")][-1] == "finished"
    assert "nothing to do" in run.detach(iterations)


STRUCK = """
import os, pathlib, signal, time
folder, plain, noted = pathlib.Path({folder!r}), os.replace, 0
def replace(source, target):
    global noted
    noted += str(target).endswith("/jobs.json")
    act = {{1: "kill", 3: "kill", 4: "hang"}}.get(noted)
    mark = folder / f"{{act}}-{{noted}}"
    if str(target).endswith("/jobs.json") and act and not mark.exists():
        mark.touch()
        if act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(900)
    plain(source, target)
os.replace = replace
"""
"""What strikes a process that submits jobs, before it has noted those of its first, third or fourth stage."""


@pytest.mark.slow
@pytest.mark.parametrize("slurm", ["fake"], indirect=True)
def test_a_gates_job_that_ends_while_it_takes_the_run_back(tmp_path: Path, slurm: Slurm) -> None:
    """Some jobs are replaced, and others are not. Where its process is killed, the job starts it again, which does the
    rest; where the job itself is ended, Slurm cancels what waits for it, and the same command goes on."""
    site, gate = tmp_path / "site", "iteration-001/gate"
    site.mkdir()
    (site / "sitecustomize.py").write_text(STRUCK.format(folder=str(tmp_path)))
    run = SlurmRun.pretended(tmp_path, slurm, stages={gate: {"setup": [f"export PYTHONPATH={site}"]}})
    rolls_back(run)
    run.detach(iterations=2)
    run.wait_for((tmp_path / "hang-4").exists, 600, "the third process of the gate's job replaces jobs")
    assert {path.name for path in tmp_path.glob("kill-*")} == {"kill-1", "kill-3"}
    assert [event["code"] for event in run.events("restart") if event["stage"] == gate] == ["137"] * 2
    ((job, _),) = run.tasks(gate)
    slurm.run("scancel", job)
    wait_for(run.is_over, 120, "all jobs end")
    assert not [stage for stage in run.digests() if stage.startswith("iteration-002")]
    run.detach(iterations=2)
    check_rolled_back(tmp_path, run, iterations=2)


def test_a_stage_that_gets_no_further_between_two_time_limits_fails(tmp_path: Path, slurm: Slurm) -> None:
    run = SlurmRun.pretended(tmp_path, slurm, setup__world=["wait", "wait"])
    run.detach(iterations=0)
    for times in (1, 2):
        run.wait_until_waiting("setup/world", times)
        ((job, _),) = run.tasks("setup/world")
        slurm.run("scontrol", "update", f"jobid={job}", "timelimit=1")
        if times == 1:
            run.wait_for(lambda: run.events("requeue"), 200, "it is told")
            slurm.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    assert "FAILED setup/world: stage setup/world made no progress between two time limits" in run.wait()


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
    run.wait_for(lambda: f"{GENERATION}  (continues from an earlier command)" in log.read_text(), 120, "it says so")
    run.release(GENERATION)
    assert driver.wait(timeout=300) == 0, log.read_text()
    assert run.digests() == {name: pretended[name] for name in run.digests()}
    again = [path.parent.name for path in (run.path / "logs").rglob("attempt-*") if path.name != "attempt-1"]
    assert again == ["generation"], "nothing else twice"
    wait_for(run.is_over, 200, "all jobs end")


def test_tasks_of_a_scorer_follow_those_of_a_generation(
    tmp_path: Path, slurm: Slurm, pretended: dict[str, str]
) -> None:
    """Two tasks each, which wait for each other's shards; one of the scorer's is killed meanwhile."""
    acts = {
        "iteration_000__heldout__generation": ["wait after 1"] * 2,
        "iteration_000__heldout__reward": ["kill after 1"],
    }
    run = SlurmRun.pretended(tmp_path, slurm, **acts)
    driver = run.start("--iters", "0", "placement.streaming=true")
    hidden = [(run.path / GENERATION).parent / f".{name}.partial-*" for name in ("generation", "reward")]

    def shards(pattern: Path) -> int:
        return len(list(pattern.parent.glob(f"{pattern.name}/.receipt-shard-*")))

    try:
        run.wait_for(lambda: shards(hidden[1]) == 2, 300, "both shards are scored")
        assert shards(hidden[0]) == 2
        assert not (run.path / GENERATION).exists()
        run.release(GENERATION)
        assert driver.wait(300) == 0
    finally:
        driver.kill()
    assert run.digests() == {name: pretended[name] for name in run.digests()}
    reasons = [event["reason"] for event in run.events("started") if event["stage"] == REWARD]
    assert reasons[0] == f"follows {GENERATION}"


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
        assert driver.wait(timeout=200) == 130
        wait_for(run.is_over, 200, "all jobs end")
    finally:
        slurm.set_up("node4")
