"""The development cluster, scripts/dev-slurm.sh: it comes up, is repaired, does what Slurm does, and leaves nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipelines_cluster import SCRIPT, UNTIL_GO, Cluster, wait_for

DAEMONS = ["munged", "mariadbd", "slurmdbd", "slurmctld", "node2"]


@pytest.fixture(scope="module")
def beside(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A second cluster, of two nodes."""
    second = Cluster(tmp_path_factory.mktemp("beside") / "state", nodes=2)
    yield second
    second.end()


def processes_with(text: str) -> dict[int, str]:
    """Command lines by process id, of those that have this in their command line or environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command_line, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if text.encode() in command_line + environment:
            found[int(folder.name)] = command_line.decode(errors="replace")
    return found


def test_up_of_a_cluster_that_runs_changes_nothing(beside: Cluster) -> None:
    before = [beside.process(daemon) for daemon in DAEMONS]
    output = beside.up()
    assert output == f"export SLURM_CONF={beside.state}/etc/slurm.conf\n"
    assert [beside.process(daemon) for daemon in DAEMONS] == before
    status = beside.script("status")
    assert status.returncode == 0, status.stdout
    assert "usable: export SLURM_CONF=" in status.stdout


def test_other_settings_than_those_of_the_cluster_are_refused(beside: Cluster) -> None:
    environment = {**os.environ, **beside.options, "DEV_SLURM_NODES": "3"}
    result = subprocess.run(["bash", SCRIPT, "up"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "DEV_SLURM_NODES=2, not 3" in result.stderr


def test_a_port_in_use_is_named(cluster: Cluster, tmp_path: Path) -> None:
    environment = {**os.environ, **cluster.options, "DEV_SLURM_STATE": str(tmp_path / "state")}
    result = subprocess.run(["bash", SCRIPT, "up"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"port {int(cluster.options['DEV_SLURM_PORT']) + 1}, for slurmdbd, is in use" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("daemon", DAEMONS)
def test_up_repairs_a_cluster_whose_daemon_was_killed(beside: Cluster, daemon: str) -> None:
    before = {name: beside.process(name) for name in DAEMONS}
    beside.kill(daemon)
    wait_for(lambda: f"{daemon} DOES NOT RUN" in beside.script("status").stdout)
    assert beside.script("status").returncode == 1
    beside.up()
    after = {name: beside.process(name) for name in DAEMONS}
    assert {name for name in DAEMONS if before[name] != after[name]} == {daemon}
    job = beside.submit("true", "--nodelist=node2")
    beside.wait_for_state(job, "COMPLETED")
    wait_for(lambda: beside.accounting([job])[job]["State"] == "COMPLETED")


def test_a_killed_controller_keeps_its_jobs(beside: Cluster) -> None:
    job = beside.submit("sleep 600")
    beside.wait_for_state(job, "RUNNING")
    waiting = beside.submit("true", f"--dependency=afterany:{job}")
    beside.restart_controller()
    assert beside.jobs() >= {job, waiting}
    assert beside.job(job)["JobState"] == "RUNNING"
    beside.run("scancel", job)
    beside.wait_for_state(waiting, "COMPLETED")


def test_a_kept_cluster_goes_on_with_its_queue_and_accounting(beside: Cluster) -> None:
    done = beside.submit("true")
    beside.wait_for_state(done, "COMPLETED")
    running = beside.submit("sleep 600")
    beside.wait_for_state(running, "RUNNING")
    held = beside.submit("true", "--hold")
    assert beside.script("down", "--keep").returncode == 0
    assert beside.script("status").returncode == 1
    assert processes_with(f"{beside.state}/") == {}
    beside.up()
    assert beside.jobs() >= {running, held}
    assert beside.accounting([done])[done]["State"] == "COMPLETED"
    beside.run("scancel", running, held)


def test_an_array_runs_on_several_nodes_and_is_accounted(cluster: Cluster, tmp_path: Path) -> None:
    script = 'echo $(hostname) $CUDA_VISIBLE_DEVICES > "$SLURM_ARRAY_TASK_ID"'
    # 16 tasks at once, however many cores the machine has.
    array = cluster.submit(
        f"{script}; {UNTIL_GO}", "--array=0-15", "--gpus-per-node=2", "--cpus-per-task=2", f"--chdir={tmp_path}"
    )
    tasks = {f"{array}_{index}" for index in range(16)}
    assert cluster.jobs() >= tasks
    (tmp_path / "go").touch()
    wait_for(lambda: not tasks & cluster.jobs())
    # Until its tasks are accounted, an array has one record, which says COMPLETED as soon as one task is.
    wait_for(lambda: set(cluster.accounting([array])) == tasks)
    wait_for(lambda: {record["State"] for record in cluster.accounting([array]).values()} == {"COMPLETED"})
    records = cluster.accounting([array])
    assert {record["NodeList"] for record in records.values()} == {"node1", "node2", "node3", "node4"}
    devices = set()
    for index in range(16):
        name, visible = (tmp_path / str(index)).read_text().split()
        assert name == records[f"{array}_{index}"]["NodeList"]
        devices.add(visible)
    assert devices == {"0,1", "2,3", "4,5", "6,7"}


def test_a_job_of_several_nodes_finds_them_by_name(cluster: Cluster, tmp_path: Path) -> None:
    find_all = "for node in $(scontrol show hostnames); do getent hosts $node; done"
    job = cluster.submit(f"srun bash -c '{find_all}' > found", "--nodes=4", f"--chdir={tmp_path}")
    cluster.wait_for_state(job, "COMPLETED")
    assert (tmp_path / "found").read_text().count("127.0.0.1") == 16


def test_down_leaves_nothing_and_the_cluster_beside_it_goes_on(
    cluster: Cluster, beside: Cluster, tmp_path: Path
) -> None:
    survivor = cluster.submit("sleep 600")
    cluster.wait_for_state(survivor, "RUNNING")
    # Processes that a job has detached, and that have forgotten their environment, belong to it all the same.
    script = "(env -i setsid sleep 1234 & echo $! > detached); sleep 1235 & touch ready; wait"
    beside.submit(script, "--nodes=2", f"--chdir={tmp_path}")
    wait_for((tmp_path / "ready").exists)
    detached = int((tmp_path / "detached").read_text())
    beside.kill("node1")  # what is left of it, too
    assert len(processes_with(f"{beside.state}/")) > len(DAEMONS)
    down = beside.script("down")
    assert down.returncode == 0, down.stderr
    assert processes_with(str(beside.state)).keys() <= {beside.ending.pid}
    assert not beside.state.exists()
    assert not Path(f"/proc/{detached}/cmdline").exists() or not Path(f"/proc/{detached}/cmdline").read_bytes()
    assert "dev-slurm" not in Path("/etc/hosts").read_text()
    assert beside.script("status").returncode == 1
    assert cluster.script("status").returncode == 0
    assert cluster.job(survivor)["JobState"] == "RUNNING"
    cluster.run("scancel", survivor)
    wait_for(lambda: survivor not in cluster.jobs())


@pytest.mark.cluster
def test_a_cluster_ends_with_the_tests_that_were_killed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    killed = f"""
import os, pathlib, pipelines_cluster
cluster = pipelines_cluster.Cluster(pathlib.Path({str(state)!r}), nodes=2)
print(cluster.run("srun", "getent", "hosts", "node2"), flush=True)
os.kill(os.getpid(), 9)
"""
    hosts = Path("/etc/hosts").read_text()
    # Without the right to make namespaces, too, jobs find the nodes; the machine knows their names then.
    plain = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    command = [*plain, sys.executable, "-c", killed]
    result = subprocess.run(command, cwd=Path(__file__).parent, check=False, text=True, stdout=subprocess.PIPE)
    assert result.returncode == -9
    assert "127.0.0.1" in result.stdout
    wait_for(lambda: not state.exists())
    wait_for(lambda: not processes_with(f"{state}/"), what="who has taken it down ends, too")
    assert Path("/etc/hosts").read_text() == hosts


def bare_tools(folder: Path) -> Path:
    """Make a folder for PATH with what the script needs, but neither Slurm nor apt-get."""
    for name in ["bash", "ls", "grep", "sed", "mkdir", "stat", "flock"]:
        (folder / name).symlink_to(f"/usr/bin/{name}")
    return folder


@pytest.mark.cluster
@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_tests_that_need_a_cluster_are_loudly_skipped_and_fail_in_ci(tmp_path: Path, ci: str, outcome: str) -> None:
    environment = {**os.environ, "PATH": str(bare_tools(tmp_path)), "CI": ci}
    chosen = f"{__file__}::{test_a_job_of_several_nodes_finds_them_by_name.__name__}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert outcome in result.stdout, result.stdout
    assert "SLURM IS NOT TESTED: error: there is no sbatch" in result.stdout
    assert "Install slurmctld slurmd" in result.stdout


def run_bare(tmp_path: Path, path: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run `up` from the standard input, with another PATH, for a cluster that there is not."""
    environment = {"PATH": path, "DEV_SLURM_STATE": str(tmp_path / "state")}
    with SCRIPT.open() as script:
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            ["/bin/bash", "-s", "up"],
            stdin=script,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )


def test_without_the_packages_it_says_what_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    bare_tools(tools)
    result = run_bare(tmp_path, str(tools))
    assert result.returncode == 2
    assert result.stdout == ""
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    for word in ["sbatch", "slurm-client", "slurmdbd", "mariadb-server-core"]:
        assert word in message
    assert not (tmp_path / "state").exists()


def test_without_root_it_says_so(tmp_path: Path) -> None:
    result = run_bare(tmp_path, os.environ["PATH"], **({"user": 65534} if os.geteuid() == 0 else {}))
    assert result.returncode == 2
    assert "needs root" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"DEV_SLURM_STATE": "relative"}, "DEV_SLURM_STATE=relative is not a plain absolute path"),
        ({"DEV_SLURM_STATE": "/tmp/with space"}, "is not a plain absolute path"),
        ({"DEV_SLURM_STATE": "/etc"}, "/etc holds something else than a development cluster"),
        ({"DEV_SLURM_NODES": "none"}, "DEV_SLURM_NODES=none is not a number"),
        ({"DEV_SLURM_PORT": "65530"}, "leaves no ports for 4 nodes"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    environment = {**os.environ, "DEV_SLURM_STATE": str(tmp_path / "state"), **options}
    result = subprocess.run(["bash", SCRIPT, "up"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "state").exists()


def test_down_deletes_no_other_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("The work of years.")
    environment = {**os.environ, "DEV_SLURM_STATE": str(tmp_path)}
    result = subprocess.run(["bash", SCRIPT, "down"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "holds something else than a development cluster" in result.stderr
    assert (tmp_path / "thesis.tex").exists()
