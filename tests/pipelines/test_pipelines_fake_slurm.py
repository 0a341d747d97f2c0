"""The fake cluster (fake_slurm.py) and the real one do the same, say the same, and refuse the same."""

import os
import subprocess
from pathlib import Path

import pytest
from pipelines_cluster import UNTIL_GO, FakeCluster, Slurm, wait_for


def test_a_dependent_job_waits_and_goes_with_a_failed_one(slurm: Slurm, tmp_path: Path) -> None:
    first = slurm.submit(f"{UNTIL_GO}; touch first", f"--chdir={tmp_path}")
    second = slurm.submit("test -e first", f"--dependency=afterok:{first}", f"--chdir={tmp_path}")
    assert slurm.job(second)["Reason"] == "Dependency"
    failing = slurm.submit("exit 3", f"--dependency=afterok:{second}")
    never = slurm.submit("true", f"--dependency=afterok:{failing}", "--kill-on-invalid-dep=yes")
    (tmp_path / "go").touch()
    slurm.wait_for_state(second, "COMPLETED")
    slurm.wait_for_state(failing, "FAILED")
    slurm.wait_for_state(never, "CANCELLED")
    wait_for(lambda: slurm.accounting([failing])[failing]["ExitCode"] == "3:0")


def test_a_job_of_low_is_requeued_for_one_of_gpu(slurm: Slurm, tmp_path: Path) -> None:
    script = 'trap "touch signalled" USR2; echo "start ${SLURM_RESTART_COUNT:-0}" >> starts; sleep 600 & wait; wait'
    options = ["--partition=low", "--nodes=4", "--exclusive", "--requeue", "--signal=B:USR2@60", "--time=60"]
    low = slurm.submit(script, *options, f"--chdir={tmp_path}")
    wait_for((tmp_path / "starts").exists)
    preempting = slurm.submit("true", "--gpus-per-node=8")
    slurm.wait_for_state(preempting, "COMPLETED")
    assert (tmp_path / "signalled").exists()
    wait_for(lambda: (tmp_path / "starts").read_text() == "start 0\nstart 1\n")
    assert slurm.job(low)["Restarts"] == "1"
    slurm.run("scancel", low)
    wait_for(lambda: low not in slurm.jobs())


def test_a_job_starts_elsewhere_when_its_node_is_down(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("echo $SLURMD_NODENAME >> nodes; sleep 600", "--requeue", f"--chdir={tmp_path}")
    nodes = tmp_path / "nodes"
    wait_for(lambda: nodes.exists() and nodes.read_text())
    first = nodes.read_text().strip()
    slurm.set_down(first)
    try:
        wait_for(lambda: len(nodes.read_text().split()) == 2)
        assert nodes.read_text().split()[1] != first
        assert slurm.job(job)["Restarts"] == "1"
    finally:
        slurm.run("scancel", job)
        slurm.set_up(first)
    wait_for(lambda: job not in slurm.jobs())


def test_an_array_is_one_line_in_the_queue_until_its_tasks_start(slurm: Slurm) -> None:
    array = slurm.submit("sleep 30", "--array=0-2%3", "--begin=now+600", "--comment=ours", "--job-name=run/stage (x)")
    form = "--format=%k|%i|%F|%T|%r|%N|%j"

    def rows() -> list[str]:
        return [line for line in slurm.run("squeue", "--me", "--noheader", form).splitlines() if array in line]

    wait_for(lambda: all("|None|" not in row for row in rows()), 200, "the scheduler has looked at it")
    (row,) = rows()
    comment, id, *rest = row.split("|", 6)
    assert (comment, rest) == ("ours", [array, "PENDING", "BeginTime", "", "run/stage (x)"])
    assert id.startswith(f"{array}_[0")
    assert slurm.jobs() >= {f"{array}_{task}" for task in range(3)}
    slurm.run("scancel", f"{array}_1")
    wait_for(lambda: f"{array}_1" not in slurm.jobs())
    slurm.run("scancel", "--quiet", array, "999999")
    wait_for(lambda: f"{array}_0" not in slurm.jobs())
    wait_for(lambda: {row["State"] for row in slurm.accounting([array]).values()} == {"CANCELLED"})
    assert {row["NodeList"] for row in slurm.accounting([array]).values()} == {"None assigned"}


def test_a_job_that_asks_for_it_is_queued_again_and_accounted_for_each_start(slurm: Slurm, tmp_path: Path) -> None:
    script = 'echo ${SLURM_RESTART_COUNT:-first} >> starts; test -n "$SLURM_RESTART_COUNT" || sleep 600'
    job = slurm.submit(script, "--requeue", f"--chdir={tmp_path}")
    wait_for(lambda: (tmp_path / "starts").exists() and (tmp_path / "starts").read_text() == "first\n")
    slurm.run("scontrol", "requeue", job)
    slurm.wait_for_state(job, "COMPLETED")
    assert (tmp_path / "starts").read_text() == "first\n1\n"
    table = ["sacct", "--duplicates", "--allocations", "--parsable2", "--noheader", "--format=State", "--jobs", job]
    wait_for(lambda: slurm.run(*table).splitlines() == ["REQUEUED", "COMPLETED"])


def test_a_step_is_told_before_its_time_is_over(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "job").write_text(
        "#!/bin/bash\n#SBATCH --signal=USR2@90\n#SBATCH --output=/dev/null\n"
        """srun bash -c 'trap "touch told; exit 3" USR2; touch begun; while true; do sleep 0.1; done'\n"""
    )
    job = slurm.run("sbatch", "--parsable", "--time=60", f"--chdir={tmp_path}", str(tmp_path / "job"))
    wait_for((tmp_path / "begun").exists)
    assert not (tmp_path / "told").exists()
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=1")
    slurm.wait_for_state(job, "FAILED")
    assert (tmp_path / "told").exists()
    assert slurm.job(job)["ExitCode"] == "3:0"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("sbatch --partition=none --wrap=true", 1, "Invalid partition name specified"),
        ("sbatch --no-such-option --wrap=true", 255, "unrecognized option '--no-such-option'"),
        ("sbatch --time=soon --wrap=true", 255, "Invalid --time specification"),
        ("sbatch --dependency=after:x --wrap=true", 1, "Job dependency problem"),
        ("scontrol show job 999999", 1, "slurm_load_jobs error: Invalid job id specified"),
        ("scontrol requeue 999999", 1, "Invalid job id specified for job 999999"),
        ("scontrol update JobId=999999 Dependency=afterok:1", 1, "Invalid job id specified for job 999999"),
        ("scancel --signal=USR2 999999", 1, "Kill job error on job id 999999: Invalid job id specified"),
        ("scancel 999999", 0, ""),
    ],
)
def test_what_cannot_be_is_refused(slurm: Slurm, tmp_path: Path, command: str, code: int, message: str) -> None:
    environment = {**os.environ, **slurm.environment}
    result = subprocess.run(command.split(), env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert result.stdout == ""


def test_partitions_and_nodes_are_listed(slurm: Slurm) -> None:
    assert slurm.run("sinfo", "--all", "--noheader", "--format=%P|%l") == "gpu*|infinite\nlow|infinite"
    assert slurm.node_state("node3") in ("idle", "mixed", "allocated")


def test_the_fake_says_that_it_is_one(fake_cluster: FakeCluster) -> None:
    program = Path(fake_cluster.environment["PATH"].partition(":")[0], "sbatch")
    assert "A fake" in program.read_text()
